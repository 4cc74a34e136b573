//! From a checkpoint on disk to a forward pass over any contiguous range of layers, on Burn.
