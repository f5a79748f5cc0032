"""`octet bench changes`: what streams notice when experts move, pools change their size, and members are lost."""
