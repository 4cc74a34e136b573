//! Content-addressed artefacts: manifests, blocks, verified exchange between peers, resumable stores.
