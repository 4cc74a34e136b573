//! The dense swarm of reinforcement learning: losses, LoRA and full training, checkpoints, policy publication.
