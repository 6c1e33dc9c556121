"""`python -m sfd_fast` is the command `sfd`; the deepspeed launcher starts it this way."""

from sfd_fast.cli import main

if __name__ == "__main__":
    main()
