"""What adapter files of all trainers hold: the kinds of layers there are, and what each of them means."""
