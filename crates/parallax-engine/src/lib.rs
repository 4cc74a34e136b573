//! An inference engine in a library: continuous batching, paged KV cache, sampling, pipelines over peers, OpenAI HTTP.
