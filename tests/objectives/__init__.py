"""The mathematics: hand-worked numbers, independent implementations, and laws over random inputs."""
