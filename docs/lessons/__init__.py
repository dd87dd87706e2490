"""The numbers and figures of the two pages that teach: losses, and the network."""
