//! Integer codes with group scales: GPTQ (Frantar et al. 2022, arXiv 2210.17323), AWQ (Lin et al. 2023, arXiv
//! 2306.00978) and compressed-tensors' symmetric "pack-quantized". In all of them weight = scale * (code - zero).
//!
//! Where groups are whole blocks of 32 neighbours and scales are f16 numbers, the rows become blocks of the kernels
//! without loss: four bits with a zero point, or eight signed bits. GPTQ's act-order scatters the groups over the
//! inputs; such a weight becomes floats.

use std::ops::Range;

use parallax_kernels::{WeightKind, dtype::BLOCK};

use super::{StoredRows, exact_f16, floats};
use crate::{
    error::OpenError,
    weights::{WeightIndex, decode::integers, to_f32},
};

/// Which of the eight nibbles of a word holds which output.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Codes of some rows [n, k], and for each row and group the scale and the zero point.
struct Coded {
    k: usize,
    codes: Vec<u8>,
    /// [n, groups]
    scales: Vec<f32>,
    /// [n, groups]
    zeros: Vec<i32>,
    /// Group of each input.
    group_of: Vec<usize>,
    groups: usize,
}

impl Coded {
    fn value(&self, row: usize, column: usize) -> f32 {
        let group = row * self.groups + self.group_of[column];
        self.scales[group] * (i32::from(self.codes[row * self.k + column]) - self.zeros[group]) as f32
    }

    /// As exact blocks, where that is possible, else as floats.
    fn rows(&self) -> StoredRows {
        let n = self.codes.len() / self.k.max(1);
        self.blocks(n).unwrap_or_else(|| {
            let values: Vec<f32> =
                (0..n).flat_map(|row| (0..self.k).map(move |column| self.value(row, column))).collect();
            floats(&values, WeightKind::Bf16)
        })
    }

    fn blocks(&self, n: usize) -> Option<StoredRows> {
        let whole = self.group_of.chunks(BLOCK).all(|block| block.iter().all(|g| *g == block[0]));
        if !self.k.is_multiple_of(BLOCK) || !whole {
            return None;
        }
        let four_bits = self.codes.iter().all(|code| *code < 16)
            && self.zeros.iter().all(|zero| (0..=255).contains(zero));
        let kind = if four_bits { WeightKind::Int4 } else { WeightKind::Q8_0 };
        let mut bytes = Vec::with_capacity(n * self.k / BLOCK * kind.block().1);
        for row in 0..n {
            for (b, codes) in
                self.codes[row * self.k..(row + 1) * self.k].as_chunks::<BLOCK>().0.iter().enumerate()
            {
                let group = row * self.groups + self.group_of[b * BLOCK];
                bytes.extend(exact_f16(self.scales[group])?.to_le_bytes());
                if four_bits {
                    bytes.extend([self.zeros[group] as u8, 0]);
                    bytes.extend((0..16).map(|i| codes[i] | codes[i + 16] << 4));
                } else {
                    for code in codes {
                        let centred = i32::from(*code) - self.zeros[group];
                        bytes.push(i8::try_from(centred).ok()?.cast_unsigned());
                    }
                }
            }
        }
        Some(StoredRows { kind, native: kind, bytes })
    }
}

/// Unsigned field `i` of `bits` bits in packed 32-bit words.
fn field(words: &[u32], bits: u32, i: usize) -> u8 {
    let per_word = (32 / bits) as usize;
    (words[i / per_word] >> (bits as usize * (i % per_word)) & ((1 << bits) - 1)) as u8
}

impl WeightIndex {
    fn words(&self, name: &str, expected: usize) -> Result<Vec<u32>, OpenError> {
        self.check_elements(name, expected)?;
        let (info, bytes) = self.read_bytes(name)?;
        let words: Vec<u32> = integers(info.dtype, &bytes).map(|v| v as u32).collect();
        if words.len() == expected {
            return Ok(words);
        }
        Err(super::unsupported(name, info.dtype.name()))
    }

    fn scales(&self, name: &str, expected: usize) -> Result<Vec<f32>, OpenError> {
        self.check_elements(name, expected)?;
        let (info, bytes) = self.read_bytes(name)?;
        Ok(to_f32(info.dtype, &bytes))
    }

    /// Number of groups of `k` inputs, from a dimension of the scales.
    fn groups(&self, name: &str, dimension: usize, k: usize) -> Result<usize, OpenError> {
        let shape = &self.get(name)?.shape;
        shape.get(dimension).copied().filter(|g| (1..=k).contains(g)).ok_or_else(|| OpenError::Shape {
            name: name.to_owned(),
            found: shape.clone(),
            expected: vec![1],
        })
    }

    pub(super) fn gptq_rows(
        &self,
        base: &str,
        bits: u32,
        zero_offset: i64,
        rows: Range<usize>,
        [n, k]: [usize; 2],
    ) -> Result<StoredRows, OpenError> {
        let name = |what: &str| format!("{base}.{what}");
        let per_word = (32 / bits) as usize;
        if !n.is_multiple_of(per_word) || !k.is_multiple_of(per_word) {
            return Err(super::unsupported(base, "rows or columns that do not fill words of 32 bits"));
        }
        let groups = self.groups(&name("scales"), 0, k)?;
        let words = self.words(&name("qweight"), k / per_word * n)?;
        let zero_words = self.words(&name("qzeros"), groups * n / per_word)?;
        let scales = self.scales(&name("scales"), groups * n)?;
        let group_of: Vec<usize> = if self.contains(&name("g_idx")) {
            let (info, bytes) = self.read_bytes(&name("g_idx"))?;
            integers(info.dtype, &bytes).map(|g| usize::try_from(g).unwrap_or(usize::MAX)).collect()
        } else {
            (0..k).map(|i| i / k.div_ceil(groups)).collect()
        };
        if group_of.len() != k || group_of.iter().any(|g| *g >= groups) {
            return Err(OpenError::Shape {
                name: name("g_idx"),
                found: vec![group_of.len()],
                expected: vec![k],
            });
        }
        let mask = (1i64 << bits) - 1;
        let mut coded =
            Coded { k, codes: Vec::new(), scales: Vec::new(), zeros: Vec::new(), group_of, groups };
        for row in rows {
            coded.codes.extend((0..k).map(|i| {
                (words[i / per_word * n + row] >> (bits as usize * (i % per_word)) & mask as u32) as u8
            }));
            for group in 0..groups {
                coded.scales.push(scales[group * n + row]);
                let stored = field(&zero_words[group * n / per_word..], bits, row);
                coded.zeros.push((i64::from(stored) + zero_offset) as i32);
            }
        }
        Ok(coded.rows())
    }

    pub(super) fn awq_rows(
        &self,
        base: &str,
        rows: Range<usize>,
        [n, k]: [usize; 2],
    ) -> Result<StoredRows, OpenError> {
        let name = |what: &str| format!("{base}.{what}");
        let groups = self.groups(&name("scales"), 0, k)?;
        let words = self.words(&name("qweight"), k * n / 8)?;
        let zero_words = self.words(&name("qzeros"), groups * n / 8)?;
        let scales = self.scales(&name("scales"), groups * n)?;
        let mut nibble_of = [0; 8];
        for (nibble, output) in AWQ_ORDER.into_iter().enumerate() {
            nibble_of[output] = nibble;
        }
        let code = |words: &[u32], line: usize, output: usize| {
            (words[line * (n / 8) + output / 8] >> (4 * nibble_of[output % 8]) & 15) as u8
        };
        let group_of = (0..k).map(|i| i / k.div_ceil(groups)).collect();
        let mut coded =
            Coded { k, codes: Vec::new(), scales: Vec::new(), zeros: Vec::new(), group_of, groups };
        for row in rows {
            coded.codes.extend((0..k).map(|i| code(&words, i, row)));
            for group in 0..groups {
                coded.scales.push(scales[group * n + row]);
                coded.zeros.push(code(&zero_words, group, row).into());
            }
        }
        Ok(coded.rows())
    }

    pub(super) fn packed_rows(
        &self,
        base: &str,
        bits: u32,
        rows: Range<usize>,
        [n, k]: [usize; 2],
    ) -> Result<StoredRows, OpenError> {
        let name = |what: &str| format!("{base}.{what}");
        let per_word = (32 / bits) as usize;
        let groups = self.groups(&name("weight_scale"), 1, k)?;
        let words = self.words(&name("weight_packed"), n * k / per_word)?;
        let scales = self.scales(&name("weight_scale"), n * groups)?;
        let group_of = (0..k).map(|i| i / k.div_ceil(groups)).collect();
        let mut coded =
            Coded { k, codes: Vec::new(), scales: Vec::new(), zeros: Vec::new(), group_of, groups };
        for row in rows {
            let words = &words[row * k / per_word..];
            coded.codes.extend((0..k).map(|i| field(words, bits, i)));
            coded.scales.extend(&scales[row * groups..(row + 1) * groups]);
            coded.zeros.extend(std::iter::repeat_n(1 << (bits - 1), groups));
        }
        Ok(coded.rows())
    }
}
