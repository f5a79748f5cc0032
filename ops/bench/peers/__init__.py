"""`octet bench peers`: this project and others on the same checkpoint, in alternation, by one definition of a rate."""
