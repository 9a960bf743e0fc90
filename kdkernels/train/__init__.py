"""A real distillation from the command line: `python -m kdkernels.train --help`."""
