//! Gradients: every [`CpuOp`](super::CpuOp) as one node of Burn's autodiff graph.

use std::sync::Arc;

use burn::backend::{
    Autodiff, Backend,
    autodiff::{
        NodeId,
        checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
        grads::Gradients,
        ops::{Backward, NodeGuard, Ops, OpsKind},
    },
    tensor::FloatTensor,
};

use super::{Kernels, ModelOps, SharedOp};

/// What a node keeps for its backward pass.
struct Kept<B: Backend> {
    op: SharedOp,
    inputs: Arc<Vec<FloatTensor<B>>>,
    saved: Arc<Vec<f32>>,
}

impl<B: Backend> Clone for Kept<B> {
    fn clone(&self) -> Self {
        Self { op: Arc::clone(&self.op), inputs: Arc::clone(&self.inputs), saved: Arc::clone(&self.saved) }
    }
}

impl<B: Backend> std::fmt::Debug for Kept<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("op", &self.op).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Step;

impl<B: Kernels, const N: usize> Backward<B, N> for Step {
    type State = Kept<B>;

    fn backward(self, ops: Ops<Kept<B>, N>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let ids: Vec<Option<NodeId>> = ops.parents.iter().map(|p| p.as_ref().map(|n| n.id)).collect();
        let wanted: Vec<bool> = ids.iter().map(Option::is_some).collect();
        let kept = ops.state;
        let results = B::run_backward(&kept.inputs, &kept.op, &kept.saved, grad, &wanted);
        for (id, result) in ids.into_iter().zip(results) {
            if let (Some(id), Some(result)) = (id, result) {
                grads.register::<B>(id, result);
            }
        }
    }
}

fn node<B: Kernels, C: CheckpointStrategy, const N: usize>(
    inputs: [FloatTensor<Autodiff<B, C>>; N],
    op: SharedOp,
) -> FloatTensor<Autodiff<B, C>> {
    let mut primitives = Vec::with_capacity(N);
    let guards: [NodeGuard; N] = inputs.map(|input| {
        let (primitive, guard) = input.into_parts();
        primitives.push(primitive);
        guard
    });
    match Step.prepare::<C>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            let (output, saved) = B::run(&primitives, &op, true);
            prepared.finish(Kept { op, inputs: Arc::new(primitives), saved: Arc::new(saved) }, output)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(B::run(&primitives, &op, false).0),
    }
}

impl<B: ModelOps + Kernels, C: CheckpointStrategy> ModelOps for Autodiff<B, C> {
    fn model_op1(a: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self> {
        node::<B, C, 1>([a], op)
    }

    fn model_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self> {
        node::<B, C, 2>([a, b], op)
    }

    fn model_op3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self> {
        node::<B, C, 3>([a, b, c], op)
    }

    fn model_op4(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self> {
        node::<B, C, 4>([a, b, c, d], op)
    }
}
