//! Every size limit on the wire, each with its reason. A length from a peer is compared with one of these before
//! anything is allocated for it.

/// Header of an RPC call or reply. Method names and messages are short; 16 KiB leaves room for long error texts.
pub const RPC_HEADER_MAX_BYTES: usize = 16 * 1024;
/// Body of one RPC call or reply. Larger payloads go through a stream or as blocks.
pub const RPC_BODY_MAX_BYTES: usize = 8 * 1024 * 1024;
/// One tensor on a stream: 16 Ki rows of 4096 f32 values.
pub const TENSOR_MAX_BYTES: usize = 256 * 1024 * 1024;
/// Dimensions of a tensor. The models here never need more than four; eight leaves room.
pub const TENSOR_MAX_DIMS: usize = 8;
/// One control message (membership, stage control, rollout records).
pub const MESSAGE_MAX_BYTES: usize = 4 * 1024 * 1024;
/// One block. Bitswap peers in the wild refuse blocks above 2 MiB.
pub const BLOCK_MAX_BYTES: usize = 2 * 1024 * 1024;
/// One Bitswap message, the limit that Kubo and Helia use too.
pub const BITSWAP_MESSAGE_MAX_BYTES: usize = 4 * 1024 * 1024;
/// Text fields such as names and namespaces.
pub const NAME_MAX_BYTES: usize = 256;
