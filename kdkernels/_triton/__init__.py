"""Triton bodies of the ops, one file per op, same stems as kdkernels/ops."""
