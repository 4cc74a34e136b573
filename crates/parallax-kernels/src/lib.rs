//! CPU kernels for language models: scalar reference, AVX2, AVX-512, and the fork-join pool they run on.
