"""What a model is worth: metrics, the tasks they are for, and a page of examples. Used by ``mgpt4 eval``."""
