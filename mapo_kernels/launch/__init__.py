"""The host side of each kernel: grids, blocks, outputs."""
