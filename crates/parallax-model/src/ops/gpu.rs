//! The operations on GPUs: our CubeCL kernels on Burn's tensors, which stay where they are. `composed` says the same; what has
//! no kernel here (sums, biases, adapters) runs as it says.
//!
//! Launches return at once and results are awaited where they are read, so an error of the device shows there.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use burn::{
    backend::{Cube, CubeDevice, DispatchDevice},
    tensor::{DType, Device, Tensor},
};
use burn_cubecl::{cubecl::client::Client, kernel::into_contiguous, tensor::CubeTensor};
use parallax_kernels::{
    KernelError,
    activation::Activation,
    dtype::BLOCK,
    gpu::{
        Values, activation,
        attention::{self, DeviceRotation, DeviceRows, Heads, Store},
        linear::{self, DeviceWeight},
        norm,
    },
};

use super::attention::{Geometry, KvStore, PagedRows, Rotation};
use crate::weights::Stacked;

const SHAPES: &str = "shapes were checked when the weights were loaded and the batch was accepted";

/// The device as kernels know it.
fn cube_device(device: &Device) -> CubeDevice {
    match device.as_dispatch() {
        DispatchDevice::Cube(device) => device.clone(),
        other => unreachable!("the route of GPUs on {other:?}"),
    }
}

fn primitive<const D: usize>(x: Tensor<D>) -> CubeTensor {
    into_contiguous(x.try_into_primitive::<Cube>().expect("a GPU's tensors, on its own route"))
}

fn values_of(x: CubeTensor) -> Values {
    let len = x.meta.shape().num_elements();
    Values::new(x.handle, len).expect("a tensor's buffer holds its elements")
}

/// A tensor as kernels take it.
fn values<const D: usize>(x: Tensor<D>) -> Values {
    values_of(primitive(x))
}

/// What results are made on.
struct Place {
    client: Client,
    device: CubeDevice,
}

impl Place {
    /// A tensor's values, and where they are.
    fn of(x: Tensor<2>) -> (Self, Values) {
        let x = primitive(x);
        let place = Self { client: x.client.clone(), device: x.device.clone() };
        (place, values_of(x))
    }

    fn matrix(self, values: Values, columns: usize) -> Tensor<2> {
        let shape = [values.len() / columns, columns];
        let x = CubeTensor::new_contiguous(
            self.client,
            self.device,
            shape.into(),
            values.into_handle(),
            DType::F32,
        );
        Tensor::from_primitive::<Cube>(x)
    }
}

/// Weights of one linear layer or table, [N, K], packed on the device; N possibly in several parts. Where K is no multiple of
/// 32 the rows end in zeros up to the next.
#[derive(Debug)]
pub(crate) struct DeviceLinear {
    device: CubeDevice,
    parts: Vec<DeviceWeight>,
    k: usize,
}

impl DeviceLinear {
    /// Uploads rows of `k` weights, packed as they are stored.
    pub(crate) fn upload(device: &Device, stacks: &[Stacked], k: usize) -> Result<Self, KernelError> {
        let device = cube_device(device);
        let client = device.client();
        let padded = k.next_multiple_of(BLOCK);
        let upload = |s: &Stacked| {
            if padded == k {
                return DeviceWeight::from_bytes(&client, s.kind, &s.bytes, s.n, k);
            }
            let bytes = zero_padded(&s.bytes, s.kind.block().1, k, padded);
            DeviceWeight::from_bytes(&client, s.kind, &bytes, s.n, padded)
        };
        let parts = stacks.iter().map(upload).collect::<Result<_, _>>()?;
        Ok(Self { device, parts, k })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(DeviceWeight::bytes).sum()
    }

    /// y [T, N] = x [T, K] · Wᵀ.
    pub(crate) fn apply(&self, x: Tensor<2>) -> Tensor<2> {
        let n = self.parts.iter().map(DeviceWeight::n).sum();
        let zeros = self.k.next_multiple_of(BLOCK) - self.k;
        let (place, x) = Place::of(if zeros == 0 { x } else { x.pad([(0, zeros)], 0.0) });
        let y = linear::linear(&place.client, &x, &self.parts).expect(SHAPES);
        place.matrix(y, n)
    }

    /// Rows `ids` of a table.
    pub(crate) fn rows(&self, ids: &[u32]) -> Tensor<2> {
        let table = &self.parts[0];
        let place = Place { client: self.device.client(), device: self.device.clone() };
        let rows = linear::rows(&place.client, table, ids).expect("ids were compared with the vocabulary");
        let rows = place.matrix(rows, table.k());
        if table.k() == self.k { rows } else { rows.slice([0..ids.len(), 0..self.k]) }
    }
}

/// Rows of `k` weights of `width` bytes each, floats since blocks are never ragged, with zeros up to `padded`.
fn zero_padded(bytes: &[u8], width: usize, k: usize, padded: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() / k * padded);
    for row in bytes.chunks_exact(k * width) {
        out.extend_from_slice(row);
        out.resize(out.len() + (padded - k) * width, 0);
    }
    out
}

/// x / sqrt(mean(x²) + eps) · w, by rows.
pub(crate) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let ((place, x), weight) = (Place::of(x), values(weight));
    let y = norm::rms_norm(&place.client, &x, &weight, eps).expect(SHAPES);
    place.matrix(y, weight.len())
}

/// RMS norm of every query and key head, or of all of them together, as the weights are long.
pub(crate) fn head_norms(
    qkv: Tensor<2>,
    q_norm: Tensor<1>,
    k_norm: Tensor<1>,
    g: &Geometry,
    eps: [f32; 2],
) -> Tensor<2> {
    // The norms are written over their rows: a buffer that somebody else holds too is copied first.
    let qkv = primitive(qkv);
    let qkv = if qkv.can_mut() { qkv } else { qkv.copy() };
    let place = Place { client: qkv.client.clone(), device: qkv.device.clone() };
    let qkv = values_of(qkv);
    let width = g.width();
    for ((columns, weight), eps) in g.parts().into_iter().zip([q_norm, k_norm]).zip(eps) {
        let weight = values(weight);
        let spans = columns.len() / weight.len();
        norm::rms_norm_spans(&place.client, &qkv, width, columns.start, spans, &weight, eps).expect(SHAPES);
    }
    place.matrix(qkv, width)
}

/// activation(gate) · up.
pub(crate) fn gated_mul(activation: Activation, gate_up: Tensor<2>) -> Tensor<2> {
    let ffn = gate_up.dims()[1] / 2;
    let (place, gate_up) = Place::of(gate_up);
    let y = activation::gated_mul(&place.client, activation, &gate_up, ffn).expect(SHAPES);
    place.matrix(y, ffn)
}

/// Keys and values of a layer on the device.
#[derive(Debug)]
pub(crate) struct DevicePages {
    device: CubeDevice,
    keys: Values,
    values: Values,
    /// Of a row: K·D.
    width: usize,
}

impl DevicePages {
    /// Pages of `slots` rows in all; what they hold before they are written is not said, and not read.
    pub(crate) fn new(device: &Device, slots: usize, width: usize) -> Self {
        let device = cube_device(device);
        let client = device.client();
        let empty = || Values::empty(&client, slots * width);
        let (keys, values) = (empty(), empty());
        Self { device, keys, values, width }
    }

    pub(crate) fn bytes(&self) -> usize {
        4 * (self.keys.len() + self.values.len())
    }

    /// Copies `n` rows over `n` others.
    pub(crate) fn copy_rows(&self, from: usize, to: usize, n: usize) {
        let client = self.device.client();
        for data in [&self.keys, &self.values] {
            attention::copy_rows(&client, data, self.width, from, to, n)
                .expect("pages were compared with the store");
        }
    }
}

/// What the layers of a pass share on the device; made by the first that needs it.
#[derive(Debug, Default)]
pub(crate) struct DeviceBatch {
    rows: OnceLock<DeviceRows>,
    /// The angles of the rows, for each rotation that the model's layers have.
    rotations: Mutex<Vec<(Arc<Rotation>, Arc<DeviceRotation>)>>,
}

impl DeviceBatch {
    fn rotation(&self, client: &Client, rotation: &Arc<Rotation>, positions: &[u32]) -> Arc<DeviceRotation> {
        let mut made = self.rotations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, angles)) = made.iter().find(|(of, _)| Arc::ptr_eq(of, rotation)) {
            return Arc::clone(angles);
        }
        let table = &rotation.table;
        let angles = table
            .angles(positions)
            .and_then(|angles| DeviceRotation::new(client, &angles, table.pairs(), rotation.interleaved));
        let angles = Arc::new(angles.expect(SHAPES));
        made.push((Arc::clone(rotation), Arc::clone(&angles)));
        angles
    }
}

/// Appends the rows' keys and values to the store, then attends over it.
pub(crate) fn paged_attention(
    qkv: Tensor<2>,
    g: &Geometry,
    store: &KvStore,
    layer: usize,
    rows: &PagedRows,
) -> Tensor<2> {
    let (place, qkv) = Place::of(qkv);
    let (client, page_tokens) = (&place.client, store.page_tokens);
    let heads = Heads { n_heads: g.n_heads, n_kv_heads: g.n_kv_heads, head_dim: g.head_dim };
    let rotation = g.rope.as_ref().map(|rope| rows.device.rotation(client, rope, &rows.positions));
    let on_device = rows
        .device
        .rows
        .get_or_init(|| DeviceRows::new(client, &rows.rows, &rows.tables, page_tokens).expect(SHAPES));
    let attended = store.with_device(layer, |pages| {
        let store = Store { keys: &pages.keys, values: &pages.values, page_tokens };
        let q = attention::append(client, &qkv, heads, rotation.as_deref(), on_device, store).expect(SHAPES);
        attention::attend(client, &q, heads, on_device, store, &g.scoring()).expect(SHAPES)
    });
    place.matrix(attended, g.n_heads * g.head_dim)
}
