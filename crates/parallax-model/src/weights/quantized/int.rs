//! Integer codes with group scales: GPTQ (Frantar et al. 2022, arXiv 2210.17323), AWQ (Lin et al. 2023, arXiv
//! 2306.00978) and compressed-tensors' symmetric "pack-quantized". In all of them weight = scale * (code - zero).
//!
//! Where groups are whole blocks of 32 neighbours and scales are f16 numbers, the rows become blocks of the kernels
//! without loss: four bits with a zero point, or eight signed bits. An activation order (GPTQ's `g_idx`,
//! compressed-tensors' `weight_g_idx`) scatters the groups over the inputs; such a weight becomes floats.

use std::ops::Range;

use half::f16;
use parallax_kernels::{WeightKind, dtype::BLOCK};

use super::unsupported;
use crate::{
    error::OpenError,
    weights::{
        StoredDtype, WeightIndex,
        decode::integers,
        reader::{ROWS_AT_ONCE, floats},
        to_f32,
    },
};

/// The nibble that holds each of the eight outputs of AWQ's words.
const AWQ_NIBBLES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Integers [N, K], and for each row and group the scale and the zero point.
#[derive(Debug)]
pub(crate) struct Coded {
    n: usize,
    k: usize,
    bits: u32,
    codes: Codes,
    /// [N, groups]
    scales: Vec<f32>,
    /// [N, groups]
    zeros: Vec<i32>,
    groups: Groups,
    /// The format of the kernels that these numbers are exactly, if one is.
    blocks: Option<WeightKind>,
}

/// Words of 32 bits with several codes each.
#[derive(Debug)]
enum Codes {
    /// Neighbouring inputs of an output: [K / per, N].
    OfInputs(Vec<u32>),
    /// Neighbouring outputs of an input, in AWQ's order: [K, N / 8].
    OfOutputs(Vec<u32>),
    /// Neighbouring inputs of an output in the tensor of this name: [N, K / per]. Rows are read as they are wanted.
    InRows(String),
}

/// The group of each input, and how many groups there are.
#[derive(Debug)]
struct Groups {
    of: Vec<usize>,
    n: usize,
}

/// The blocks that codes of so many bits fit.
pub(super) fn block_kind(bits: u32) -> WeightKind {
    if bits == 4 { WeightKind::Int4 } else { WeightKind::Q8_0 }
}

/// Field `i` of `bits` bits in a word.
fn field(word: u32, bits: u32, i: usize) -> u8 {
    (word >> (bits as usize * i) & ((1 << bits) - 1)) as u8
}

/// Field of an output in AWQ's words [.., N / 8], of which this is line `line`.
fn awq_field(words: &[u32], n: usize, line: usize, output: usize) -> u8 {
    field(words[line * (n / 8) + output / 8], 4, AWQ_NIBBLES[output % 8])
}

/// [groups, N] as [N, groups].
fn by_row(by_group: &[f32], n: usize) -> Vec<f32> {
    (0..n).flat_map(|row| by_group.iter().skip(row).step_by(n).copied()).collect()
}

/// Words of a tensor, or of some of its rows; what are no integers gives none.
fn as_words(name: &str, dtype: StoredDtype, bytes: &[u8], expected: usize) -> Result<Vec<u32>, OpenError> {
    let words: Vec<u32> = integers(dtype, bytes).map(|v| v as u32).collect();
    if words.len() == expected { Ok(words) } else { Err(unsupported(name, dtype.name())) }
}

fn read_words(index: &WeightIndex, name: &str, expected: usize) -> Result<Vec<u32>, OpenError> {
    index.check_elements(name, expected)?;
    let (info, bytes) = index.read_bytes(name)?;
    as_words(name, info.dtype, &bytes, expected)
}

fn read_scales(index: &WeightIndex, name: &str, expected: usize) -> Result<Vec<f32>, OpenError> {
    index.check_elements(name, expected)?;
    let (info, bytes) = index.read_bytes(name)?;
    Ok(to_f32(info.dtype, &bytes))
}

/// Number of groups of `k` inputs, from a dimension of the scales.
fn n_groups(index: &WeightIndex, name: &str, dimension: usize, k: usize) -> Result<usize, OpenError> {
    let shape = &index.get(name)?.shape;
    shape.get(dimension).copied().filter(|g| (1..=k).contains(g)).ok_or_else(|| OpenError::Shape {
        name: name.to_owned(),
        found: shape.clone(),
        expected: vec![1],
    })
}

/// Groups of `k` inputs in their order.
fn in_order(n: usize, k: usize) -> Groups {
    let size = k.div_ceil(n);
    Groups { of: (0..k).map(|i| i / size).collect(), n }
}

/// Groups as the tensor `name` lists them, where it is there. compressed-tensors lists -1 where there is no order.
fn listed(index: &WeightIndex, name: &str, n: usize, k: usize) -> Result<Groups, OpenError> {
    if !index.contains(name) {
        return Ok(in_order(n, k));
    }
    index.check_elements(name, k)?;
    let (info, bytes) = index.read_bytes(name)?;
    let listed: Vec<i64> = integers(info.dtype, &bytes).collect();
    if listed.len() != k {
        return Err(unsupported(name, info.dtype.name()));
    }
    if listed.iter().all(|group| *group == -1) {
        return Ok(in_order(n, k));
    }
    let group = |listed: &i64| usize::try_from(*listed).ok().filter(|group| *group < n).ok_or(*listed);
    let of: Result<Vec<usize>, i64> = listed.iter().map(group).collect();
    let of = of.map_err(|bad| {
        index.files[info.file].corrupt(format!("tensor {name:?} names group {bad}, there are {n}"))
    })?;
    Ok(Groups { of, n })
}

impl Coded {
    pub(super) fn gptq(
        index: &WeightIndex,
        base: &str,
        bits: u32,
        zero_offset: i64,
        [n, k]: [usize; 2],
    ) -> Result<Self, OpenError> {
        let name = |what: &str| format!("{base}.{what}");
        let per_word = (32 / bits) as usize;
        if !n.is_multiple_of(per_word) || !k.is_multiple_of(per_word) {
            return Err(unsupported(base, "rows or columns that do not fill words of 32 bits"));
        }
        let groups = n_groups(index, &name("scales"), 0, k)?;
        let codes = read_words(index, &name("qweight"), k / per_word * n)?;
        let zero_words = read_words(index, &name("qzeros"), groups * n / per_word)?;
        let scales = read_scales(index, &name("scales"), groups * n)?;
        let mut zeros = Vec::with_capacity(n * groups);
        for row in 0..n {
            zeros.extend((0..groups).map(|group| {
                let at = group * n + row;
                (i64::from(field(zero_words[at / per_word], bits, at % per_word)) + zero_offset) as i32
            }));
        }
        let coded = Self {
            n,
            k,
            bits,
            codes: Codes::OfInputs(codes),
            scales: by_row(&scales, n),
            zeros,
            groups: listed(index, &name("g_idx"), groups, k)?,
            blocks: None,
        };
        coded.settled(index)
    }

    pub(super) fn awq(index: &WeightIndex, base: &str, [n, k]: [usize; 2]) -> Result<Self, OpenError> {
        let name = |what: &str| format!("{base}.{what}");
        let groups = n_groups(index, &name("scales"), 0, k)?;
        let codes = read_words(index, &name("qweight"), k * n / 8)?;
        let zero_words = read_words(index, &name("qzeros"), groups * n / 8)?;
        let scales = read_scales(index, &name("scales"), groups * n)?;
        let mut zeros = Vec::with_capacity(n * groups);
        for row in 0..n {
            zeros.extend((0..groups).map(|group| i32::from(awq_field(&zero_words, n, group, row))));
        }
        let coded = Self {
            n,
            k,
            bits: 4,
            codes: Codes::OfOutputs(codes),
            scales: by_row(&scales, n),
            zeros,
            groups: in_order(groups, k),
            blocks: None,
        };
        coded.settled(index)
    }

    pub(super) fn packed(
        index: &WeightIndex,
        base: &str,
        bits: u32,
        [n, k]: [usize; 2],
    ) -> Result<Self, OpenError> {
        let name = |what: &str| format!("{base}.{what}");
        let groups = n_groups(index, &name("weight_scale"), 1, k)?;
        index.check_elements(&name("weight_packed"), n * k / (32 / bits) as usize)?;
        let coded = Self {
            n,
            k,
            bits,
            codes: Codes::InRows(name("weight_packed")),
            scales: read_scales(index, &name("weight_scale"), n * groups)?,
            zeros: vec![1 << (bits - 1); n * groups],
            groups: listed(index, &name("weight_g_idx"), groups, k)?,
            blocks: None,
        };
        coded.settled(index)
    }

    /// The format of the kernels that the rows have, if there is one: floats otherwise.
    pub(crate) fn blocks(&self) -> Option<WeightKind> {
        self.blocks
    }

    /// Blocks where they are exact: groups of whole blocks, scales that are f16 numbers, and, with eight bits, codes that
    /// are at most eight signed bits from their zero points.
    fn settled(mut self, index: &WeightIndex) -> Result<Self, OpenError> {
        let whole = self.groups.of.chunks(BLOCK).all(|block| block.iter().all(|g| *g == block[0]));
        let exact = |scale: &f32| f16::from_f32(*scale).to_f32() == *scale;
        if whole && self.k.is_multiple_of(BLOCK) && self.scales.iter().all(exact) {
            let kind = block_kind(self.bits);
            let fits = kind == WeightKind::Int4 || self.fits_eight_bits(index)?;
            self.blocks = fits.then_some(kind);
        }
        Ok(self)
    }

    fn fits_eight_bits(&self, index: &WeightIndex) -> Result<bool, OpenError> {
        // Around the middle code they all do.
        if self.zeros.iter().all(|zero| *zero == 128) {
            return Ok(true);
        }
        for first in (0..self.n).step_by(ROWS_AT_ONCE) {
            let rows = first..self.n.min(first + ROWS_AT_ONCE);
            let codes = self.codes(index, rows.clone())?;
            for (row, codes) in rows.zip(codes.chunks_exact(self.k)) {
                let of_row = codes.iter().zip(&self.groups.of);
                if of_row
                    .map(|(code, group)| self.above_zero(row, *code, *group))
                    .any(|v| i8::try_from(v).is_err())
                {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn above_zero(&self, row: usize, code: u8, group: usize) -> i32 {
        i32::from(code) - self.zeros[row * self.groups.n + group]
    }

    /// Codes of some rows [rows, K].
    fn codes(&self, index: &WeightIndex, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        let (n, k, bits) = (self.n, self.k, self.bits);
        let per_word = (32 / bits) as usize;
        let mut codes = Vec::with_capacity(rows.len() * k);
        match &self.codes {
            Codes::OfInputs(words) => {
                for row in rows {
                    codes.extend((0..k).map(|i| field(words[i / per_word * n + row], bits, i % per_word)));
                }
            }
            Codes::OfOutputs(words) => {
                for row in rows {
                    codes.extend((0..k).map(|i| awq_field(words, n, i, row)));
                }
            }
            Codes::InRows(name) => {
                let (dtype, all) = (index.get(name)?.dtype, rows.len() * k);
                let words = as_words(name, dtype, &index.read_rows(name, rows)?, all / per_word)?;
                codes.extend((0..all).map(|i| field(words[i / per_word], bits, i % per_word)));
            }
        }
        Ok(codes)
    }

    /// Some rows: blocks, or floats.
    pub(crate) fn rows(&self, index: &WeightIndex, rows: Range<usize>) -> Result<Vec<u8>, OpenError> {
        let codes = self.codes(index, rows.clone())?;
        let rows = rows.zip(codes.chunks_exact(self.k));
        let Some(kind) = self.blocks else {
            let mut values = Vec::with_capacity(codes.len());
            for (row, codes) in rows {
                values.extend(codes.iter().zip(&self.groups.of).map(|(code, group)| {
                    self.scales[row * self.groups.n + group] * self.above_zero(row, *code, *group) as f32
                }));
            }
            return Ok(floats(&values));
        };
        let mut bytes = Vec::with_capacity(codes.len() / BLOCK * kind.block().1);
        for (row, codes) in rows {
            let blocks = codes.as_chunks::<BLOCK>().0.iter();
            for (codes, group) in blocks.zip(self.groups.of.iter().step_by(BLOCK)) {
                let at = row * self.groups.n + group;
                bytes.extend(f16::from_f32(self.scales[at]).to_le_bytes());
                if kind == WeightKind::Int4 {
                    bytes.extend([self.zeros[at] as u8, 0]);
                    bytes.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
                } else {
                    bytes.extend(codes.iter().map(|code| self.above_zero(row, *code, *group) as u8));
                }
            }
        }
        Ok(bytes)
    }
}
