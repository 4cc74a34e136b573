//! Adapters onto loaded layers: each module's factors, cut and sorted as the layer's packed weights are.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};

use crate::{
    adapter::{
        Adapter, LoraTensors,
        modules::{Module, Place, module_of, split},
    },
    config::{Mixer, ModelConfig},
    error::AdapterError,
    layer::{AdapterSlot, LatentAdapter, LayerWeights, Linear, MixerWeights, MlpWeights},
    ops::latent::LatentLora,
};

/// The linear layer at a place; `None` for the matrices of latent heads, and where the layer has no such place.
pub(crate) fn linear_at(layer: &mut LayerWeights, place: Place) -> Option<&mut Linear> {
    match place {
        Place::GateUp | Place::Down => {
            let mlp = match &mut layer.mlp {
                MlpWeights::Dense(mlp) => mlp,
                MlpWeights::Experts(experts) => experts.shared.as_mut()?,
            };
            return Some(if place == Place::GateUp { &mut mlp.gate_up } else { &mut mlp.down });
        }
        Place::SharedGate => {
            return match &mut layer.mlp {
                MlpWeights::Experts(experts) => experts.shared_gate.as_mut(),
                MlpWeights::Dense(_) => None,
            };
        }
        _ => {}
    }
    match (&mut layer.mixer, place) {
        (MixerWeights::Attention(a), Place::Qkv) => Some(&mut a.qkv),
        (MixerWeights::Attention(a), Place::Gate) => a.gate.as_mut(),
        (MixerWeights::Attention(a), Place::Out) => Some(&mut a.o),
        (MixerWeights::Latent(a), Place::LatentIn) => Some(&mut a.q_in),
        (MixerWeights::Latent(a), Place::LatentOut) => a.q_out.as_mut().map(|(_, out)| out),
        (MixerWeights::Latent(a), Place::KvIn) => Some(&mut a.kv_in),
        (MixerWeights::Latent(a), Place::Out) => Some(&mut a.o),
        (MixerWeights::Delta(d), Place::Qkvz) => Some(&mut d.qkvz),
        (MixerWeights::Delta(d), Place::Ba) => Some(&mut d.ba),
        (MixerWeights::Delta(d), Place::Out) => Some(&mut d.out),
        _ => None,
    }
}

/// Rows of a matrix in another order.
fn rows(values: &[f32], width: usize, order: Option<&Vec<usize>>) -> Vec<f32> {
    match order {
        None => values.to_vec(),
        Some(order) => {
            order.iter().flat_map(|row| &values[row * width..(row + 1) * width]).copied().collect()
        }
    }
}

/// Columns of a matrix in another order.
fn columns(values: &[f32], width: usize, order: Option<&Vec<usize>>) -> Vec<f32> {
    match order {
        None => values.to_vec(),
        Some(order) => {
            values.chunks_exact(width).flat_map(|row| order.iter().map(|column| row[*column])).collect()
        }
    }
}

/// Replaces the adapter of a slot in the layers `range`, which `layers` holds; modules of other layers are left out.
pub(crate) fn attach(
    layers: &mut [LayerWeights],
    range: &Range<usize>,
    config: &ModelConfig,
    slot: &AdapterSlot,
    adapter: Option<&Adapter>,
    device: &Device,
) -> Result<(), AdapterError> {
    if let Some(adapter) = adapter {
        adapter.check(config)?;
    }
    for layer in layers.iter_mut() {
        layer.linears_mut().into_iter().for_each(|linear| linear.lora.retain(|part| part.id != slot.id));
        if let MixerWeights::Latent(latent) = &mut layer.mixer {
            latent.adapters.retain(|part| part.slot.id != slot.id);
        }
    }
    let Some(adapter) = adapter else { return Ok(()) };
    for (name, t) in &adapter.tensors {
        let Some((layer, short)) = split(name).filter(|(layer, _)| range.contains(layer)) else { continue };
        let module = module_of(config, layer, short).expect("the adapter was checked against the model");
        let weights = &mut layers[layer - range.start];
        if let (MixerWeights::Latent(latent), Mixer::Latent(a), [part]) =
            (&mut weights.mixer, &config.layers[layer].mixer, module.parts.as_slice())
            && part.place == Place::KvOut
        {
            let dims = [a.n_heads, a.nope_dim, a.value_dim];
            let lora = LatentLora::new(dims, &t.a, &t.b, adapter.rank, adapter.scale());
            latent.adapters.push(LatentAdapter { slot: slot.clone(), lora });
            latent.adapters.sort_by_key(|part| part.slot.id);
            continue;
        }
        add(weights, slot, &module, t, adapter, device);
    }
    Ok(())
}

/// Adds a module's factors to the linear layers that have its outputs.
fn add(
    layer: &mut LayerWeights,
    slot: &AdapterSlot,
    module: &Module,
    t: &LoraTensors,
    adapter: &Adapter,
    device: &Device,
) {
    let rank = adapter.rank;
    let matrix =
        |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), device);
    let a = columns(&t.a, t.inputs, module.columns.as_ref());
    for part in &module.parts {
        let b = rows(&t.b, rank, part.rows.as_ref());
        let (a, outputs) = (matrix(a.clone(), [rank, t.inputs]), b.len() / rank);
        let linear = linear_at(layer, part.place).expect("every module has its place in the loaded layer");
        linear.add_module(slot, a, matrix(b, [outputs, rank]), part.offset, adapter.scale());
    }
}
