"""The commands of `sfd`: one file each, with its options and its run; nothing else imports them."""
