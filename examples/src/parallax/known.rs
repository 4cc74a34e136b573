//! Known checkpoints of the supported families: the shape of each, from its published config.json.

/// The shape of a checkpoint, as far as memory depends on it.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// Repository on the model hub.
    pub name: &'static str,
    /// `llama` or `qwen3`.
    pub family: &'static str,
    /// Decoder layers.
    pub layers: u64,
    /// Hidden width.
    pub hidden: u64,
    /// Feed-forward width.
    pub ffn: u64,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Vocabulary.
    pub vocab: u64,
    /// The head is the embedding table.
    pub tied: bool,
    /// Positions.
    pub context: u64,
}

impl Known {
    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        let attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads);
        let norms = 2 * self.hidden + if self.family == "qwen3" { 2 * self.head_dim } else { 0 };
        let layer = attention + 3 * self.hidden * self.ffn + norms;
        let tables = if self.tied { 1 } else { 2 };
        self.layers * layer + tables * self.vocab * self.hidden + self.hidden
    }
}

/// Shapes in the order layers, hidden, ffn, heads, kv heads, head width, vocabulary, tied, context.
type Shape = (u64, u64, u64, u64, u64, u64, u64, bool, u64);

const fn known(name: &'static str, family: &'static str, shape: Shape) -> Known {
    let (layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied, context) = shape;
    Known { name, family, layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied, context }
}

const fn llama(name: &'static str, shape: Shape) -> Known {
    known(name, "llama", shape)
}

const fn qwen3(name: &'static str, shape: Shape) -> Known {
    known(name, "qwen3", shape)
}

const SMOLLM2_135M: Shape = (30, 576, 1536, 9, 3, 64, 49152, true, 8192);
const SMOLLM2_360M: Shape = (32, 960, 2560, 15, 5, 64, 49152, true, 8192);
const SMOLLM2_1_7B: Shape = (24, 2048, 8192, 32, 32, 64, 49152, true, 8192);
const LLAMA2_7B: Shape = (32, 4096, 11008, 32, 32, 128, 32000, false, 4096);
const LLAMA2_13B: Shape = (40, 5120, 13824, 40, 40, 128, 32000, false, 4096);
const LLAMA2_70B: Shape = (80, 8192, 28672, 64, 8, 128, 32000, false, 4096);
const LLAMA3_8B: Shape = (32, 4096, 14336, 32, 8, 128, 128256, false, 8192);
const LLAMA3_70B: Shape = (80, 8192, 28672, 64, 8, 128, 128256, false, 8192);
const LLAMA31_8B: Shape = (32, 4096, 14336, 32, 8, 128, 128256, false, 131072);
const LLAMA31_70B: Shape = (80, 8192, 28672, 64, 8, 128, 128256, false, 131072);
const LLAMA31_405B: Shape = (126, 16384, 53248, 128, 8, 128, 128256, false, 131072);
const LLAMA32_1B: Shape = (16, 2048, 8192, 32, 8, 64, 128256, true, 131072);
const LLAMA32_3B: Shape = (28, 3072, 8192, 24, 8, 128, 128256, true, 131072);
const TINY_LLAMA: Shape = (22, 2048, 5632, 32, 4, 64, 32000, false, 2048);
// Base models of the family have 32768 positions, the others as given here.
const fn base(shape: Shape) -> Shape {
    let (layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied, _) = shape;
    (layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied, 32768)
}

const QWEN3_0_6B: Shape = (28, 1024, 3072, 16, 8, 128, 151936, true, 40960);
const QWEN3_1_7B: Shape = (28, 2048, 6144, 16, 8, 128, 151936, true, 40960);
const QWEN3_4B: Shape = (36, 2560, 9728, 32, 8, 128, 151936, true, 40960);
const QWEN3_4B_2507: Shape = (36, 2560, 9728, 32, 8, 128, 151936, true, 262144);
const QWEN3_8B: Shape = (36, 4096, 12288, 32, 8, 128, 151936, false, 40960);
const QWEN3_14B: Shape = (40, 5120, 17408, 40, 8, 128, 151936, false, 40960);
const QWEN3_32B: Shape = (64, 5120, 25600, 64, 8, 128, 151936, false, 40960);

/// The known checkpoints, by family and size.
pub const KNOWN: &[Known] = &[
    llama("HuggingFaceTB/SmolLM2-135M", SMOLLM2_135M),
    llama("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2_135M),
    llama("HuggingFaceTB/SmolLM2-360M", SMOLLM2_360M),
    llama("HuggingFaceTB/SmolLM2-360M-Instruct", SMOLLM2_360M),
    llama("HuggingFaceTB/SmolLM2-1.7B", SMOLLM2_1_7B),
    llama("HuggingFaceTB/SmolLM2-1.7B-Instruct", SMOLLM2_1_7B),
    llama("TinyLlama/TinyLlama-1.1B-Chat-v1.0", TINY_LLAMA),
    llama("meta-llama/Llama-3.2-1B", LLAMA32_1B),
    llama("meta-llama/Llama-3.2-1B-Instruct", LLAMA32_1B),
    llama("meta-llama/Llama-3.2-3B", LLAMA32_3B),
    llama("meta-llama/Llama-3.2-3B-Instruct", LLAMA32_3B),
    llama("meta-llama/Llama-2-7b-hf", LLAMA2_7B),
    llama("meta-llama/Llama-2-7b-chat-hf", LLAMA2_7B),
    llama("meta-llama/Llama-2-13b-hf", LLAMA2_13B),
    llama("meta-llama/Llama-2-13b-chat-hf", LLAMA2_13B),
    llama("meta-llama/Llama-2-70b-hf", LLAMA2_70B),
    llama("meta-llama/Llama-2-70b-chat-hf", LLAMA2_70B),
    llama("meta-llama/Meta-Llama-3-8B", LLAMA3_8B),
    llama("meta-llama/Meta-Llama-3-8B-Instruct", LLAMA3_8B),
    llama("meta-llama/Meta-Llama-3-70B", LLAMA3_70B),
    llama("meta-llama/Meta-Llama-3-70B-Instruct", LLAMA3_70B),
    llama("meta-llama/Llama-3.1-8B", LLAMA31_8B),
    llama("meta-llama/Llama-3.1-8B-Instruct", LLAMA31_8B),
    llama("meta-llama/Llama-3.1-70B", LLAMA31_70B),
    llama("meta-llama/Llama-3.1-70B-Instruct", LLAMA31_70B),
    llama("meta-llama/Llama-3.1-405B", LLAMA31_405B),
    llama("meta-llama/Llama-3.1-405B-Instruct", LLAMA31_405B),
    llama("meta-llama/Llama-3.3-70B-Instruct", LLAMA31_70B),
    llama("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", LLAMA31_8B),
    llama("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", LLAMA31_70B),
    llama("NousResearch/Hermes-3-Llama-3.1-8B", LLAMA31_8B),
    qwen3("Qwen/Qwen3-0.6B", QWEN3_0_6B),
    qwen3("Qwen/Qwen3-0.6B-Base", base(QWEN3_0_6B)),
    qwen3("Qwen/Qwen3-1.7B", QWEN3_1_7B),
    qwen3("Qwen/Qwen3-1.7B-Base", base(QWEN3_1_7B)),
    qwen3("Qwen/Qwen3-4B", QWEN3_4B),
    qwen3("Qwen/Qwen3-4B-Base", base(QWEN3_4B)),
    qwen3("Qwen/Qwen3-4B-Instruct-2507", QWEN3_4B_2507),
    qwen3("Qwen/Qwen3-4B-Thinking-2507", QWEN3_4B_2507),
    qwen3("Qwen/Qwen3-8B", QWEN3_8B),
    qwen3("Qwen/Qwen3-8B-Base", base(QWEN3_8B)),
    qwen3("Qwen/Qwen3-14B", QWEN3_14B),
    qwen3("Qwen/Qwen3-14B-Base", base(QWEN3_14B)),
    qwen3("Qwen/Qwen3-32B", QWEN3_32B),
];
