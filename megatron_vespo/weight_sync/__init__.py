"""New policy weights from the trainer's ranks to the engines, over a process group of their own."""
