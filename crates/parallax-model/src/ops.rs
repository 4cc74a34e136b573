//! The hot operations, as Burn extension ops.
//!
//! One small trait, [`CpuOp`], says what an operation is: slices in, values out, and the gradients of its
//! inputs. The extension trait [`ModelOps`] carries any such operation through Burn's dispatch, with or without
//! autodiff, so that each operation is written once and without Burn's types. Where nothing asks for gradients, `fused`
//! runs whole parts of a layer as one. `composed` says the same in Burn operations, the specification, and `gpu` for GPUs.

pub(crate) mod activation;
pub(crate) mod attention;
#[cfg(feature = "train")]
mod autodiff;
pub(crate) mod composed;
pub(crate) mod delta;
pub(crate) mod embedding;
pub(crate) mod experts;
pub(crate) mod fused;
#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod head;
pub(crate) mod latent;
pub(crate) mod linear;
mod matrix;
pub(crate) mod norm;
mod scratch;
mod share;

use std::{fmt, ops::Deref, sync::Arc};

use burn::{
    backend::{Backend, Dispatch, Flex, backend_extension, tensor::FloatTensor},
    tensor::Tensor,
};

type FlexTensor = FloatTensor<Flex>;

/// Values and shape of a result.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) values: Vec<f32>,
    pub(crate) shape: Vec<usize>,
    /// What the backward pass needs besides the inputs; empty when it was not asked for.
    pub(crate) saved: Vec<f32>,
}

impl Output {
    pub(crate) fn matrix(values: Vec<f32>, columns: usize) -> Self {
        let rows = values.len() / columns;
        Self { values, shape: vec![rows, columns], saved: Vec::new() }
    }
}

/// What a backward pass is given.
#[derive(Debug)]
pub(crate) struct BackwardArgs<'a> {
    /// The forward inputs.
    pub(crate) inputs: &'a [&'a [f32]],
    /// [`Output::saved`].
    pub(crate) saved: &'a [f32],
    /// Gradient of the result.
    pub(crate) grad: &'a [f32],
    /// Which inputs' gradients are wanted.
    pub(crate) wanted: &'a [bool],
}

/// An operation on the CPU.
pub(crate) trait CpuOp: fmt::Debug + Send + Sync {
    /// Computes the result; `keep` asks for what the backward pass needs.
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output;

    /// Gradients of the inputs, in their order and of their lengths; `None` where not wanted.
    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>>;
}

/// A shared operation, as it passes through the dispatch.
pub(crate) type SharedOp = Arc<dyn CpuOp>;

/// Reading and making the tensors of a back end; not dispatched.
pub(crate) trait Kernels: Backend {
    fn run(inputs: &[FloatTensor<Self>], op: &SharedOp, keep: bool) -> (FloatTensor<Self>, Vec<f32>);

    #[cfg(feature = "train")]
    fn run_backward(
        inputs: &[FloatTensor<Self>],
        op: &SharedOp,
        saved: &[f32],
        grad: FloatTensor<Self>,
        wanted: &[bool],
    ) -> Vec<Option<FloatTensor<Self>>>;
}

/// Extension ops by number of tensor inputs.
#[backend_extension(Flex, Autodiff: cfg(feature = "train"))]
pub(crate) trait ModelOps: Backend {
    /// One input.
    fn model_op1(a: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self>;
    /// Two inputs.
    fn model_op2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: SharedOp) -> FloatTensor<Self>;
    /// Three inputs.
    fn model_op3(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self>;
    /// Four inputs.
    fn model_op4(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        op: SharedOp,
    ) -> FloatTensor<Self>;
}

/// Runs an operation on a tensor.
pub(crate) fn run1<const D: usize, const R: usize>(a: Tensor<D>, op: impl CpuOp + 'static) -> Tensor<R> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::model_op1(a.into_dispatch(), Arc::new(op)))
}

/// Runs an operation on two tensors.
pub(crate) fn run2<const D: usize, const E: usize, const R: usize>(
    a: Tensor<D>,
    b: Tensor<E>,
    op: impl CpuOp + 'static,
) -> Tensor<R> {
    Tensor::from_dispatch(<Dispatch as ModelOps>::model_op2(
        a.into_dispatch(),
        b.into_dispatch(),
        Arc::new(op),
    ))
}

/// Runs an operation on three tensors.
pub(crate) fn run3<const D: usize, const E: usize, const F: usize, const R: usize>(
    a: Tensor<D>,
    b: Tensor<E>,
    c: Tensor<F>,
    op: impl CpuOp + 'static,
) -> Tensor<R> {
    let (a, b, c) = (a.into_dispatch(), b.into_dispatch(), c.into_dispatch());
    Tensor::from_dispatch(<Dispatch as ModelOps>::model_op3(a, b, c, Arc::new(op)))
}

/// Runs an operation on four tensors.
pub(crate) fn run4<const D: usize, const E: usize, const F: usize, const G: usize, const R: usize>(
    a: Tensor<D>,
    b: Tensor<E>,
    c: Tensor<F>,
    d: Tensor<G>,
    op: impl CpuOp + 'static,
) -> Tensor<R> {
    let (a, b) = (a.into_dispatch(), b.into_dispatch());
    let (c, d) = (c.into_dispatch(), d.into_dispatch());
    Tensor::from_dispatch(<Dispatch as ModelOps>::model_op4(a, b, c, d, Arc::new(op)))
}

fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.as_slice::<f32>().expect("inputs were made contiguous f32 tensors")
}

fn contiguous(tensor: &FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor.clone() } else { tensor.to_contiguous() }
}

fn tensor(values: Vec<f32>, shape: Vec<usize>) -> FlexTensor {
    FlexTensor::from_data(burn::tensor::TensorData::new(values, shape))
}

/// The values of a tensor in memory, shared with it.
#[derive(Debug)]
pub(crate) struct Values(FlexTensor);

impl Values {
    /// Of a tensor on the CPU that is no part of a graph of gradients.
    pub(crate) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        let tensor = tensor.clone().try_into_primitive::<Flex>();
        Self(contiguous(&tensor.expect("inference with packed weights has all others in memory")))
    }
}

impl Deref for Values {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        slice(&self.0)
    }
}

impl Kernels for Flex {
    fn run(inputs: &[FlexTensor], op: &SharedOp, keep: bool) -> (FlexTensor, Vec<f32>) {
        let gathered: Vec<FlexTensor>;
        let inputs = if inputs.iter().all(|input| input.is_contiguous()) {
            inputs
        } else {
            gathered = inputs.iter().map(contiguous).collect();
            gathered.as_slice()
        };
        let slices: Vec<&[f32]> = inputs.iter().map(slice).collect();
        let output = op.forward(&slices, keep);
        (tensor(output.values, output.shape), output.saved)
    }

    #[cfg(feature = "train")]
    fn run_backward(
        inputs: &[FlexTensor],
        op: &SharedOp,
        saved: &[f32],
        grad: FlexTensor,
        wanted: &[bool],
    ) -> Vec<Option<FlexTensor>> {
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|t| t.layout().shape().to_vec()).collect();
        let inputs: Vec<FlexTensor> = inputs.iter().map(contiguous).collect();
        let slices: Vec<&[f32]> = inputs.iter().map(slice).collect();
        let grad = contiguous(&grad);
        let args = BackwardArgs { inputs: &slices, saved, grad: slice(&grad), wanted };
        let grads = op.backward(&args);
        grads.into_iter().zip(shapes).map(|(g, shape)| g.map(|g| tensor(g, shape))).collect()
    }
}

impl ModelOps for Flex {
    fn model_op1(a: FlexTensor, op: SharedOp) -> FlexTensor {
        Self::run(&[a], &op, false).0
    }

    fn model_op2(a: FlexTensor, b: FlexTensor, op: SharedOp) -> FlexTensor {
        Self::run(&[a, b], &op, false).0
    }

    fn model_op3(a: FlexTensor, b: FlexTensor, c: FlexTensor, op: SharedOp) -> FlexTensor {
        Self::run(&[a, b, c], &op, false).0
    }

    fn model_op4(a: FlexTensor, b: FlexTensor, c: FlexTensor, d: FlexTensor, op: SharedOp) -> FlexTensor {
        Self::run(&[a, b, c, d], &op, false).0
    }
}
