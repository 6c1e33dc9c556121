"""The page of `sfd app`: what a person chose, the trajectories drawn for it, and the page in the browser."""
