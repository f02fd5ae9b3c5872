"""What people call in scripts of their own: the Python interface of Open-Sora 2, over what the commands use."""
