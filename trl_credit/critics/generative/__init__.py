"""A critic that writes its values down: the network, what it is asked, and how its answer is read."""
