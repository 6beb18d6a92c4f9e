"""How the loss at many points of a plane is evaluated: the ways there are, what each does, and which is fastest."""
