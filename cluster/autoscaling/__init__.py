"""How large the pools should be, and why: pure policies, and the loop that asks them."""
