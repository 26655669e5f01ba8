"""`mocov3 gpu`: is a GPU right, and how fast is it?"""
