"""The processes of the pools, and the router service: what runs in them, and how Ray starts them."""
