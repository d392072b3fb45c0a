"""An independent StagFormer in plain PyTorch, written from the formulas and sharing no code with stagdist."""
