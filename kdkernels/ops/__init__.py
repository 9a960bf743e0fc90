"""One file for each loss: its formula, its reference, its registered op, its public function."""
