//! Anyone can check what was computed: commitments to hidden states, challenges, recomputation, verdicts.
