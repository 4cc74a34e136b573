//! Attention against the reference, finite differences, and itself under other batchings.

use super::*;
use crate::reference::attention::{Shape, causal};
use crate::testing::{
    assert_close, assert_gradient, bits, noise, rounded, same_at_every_level, with_threads,
};

const SHAPES: [Shape; 4] = [
    Shape { n_heads: 9, n_kv_heads: 3, head_dim: 64 },
    Shape { n_heads: 4, n_kv_heads: 4, head_dim: 8 },
    Shape { n_heads: 8, n_kv_heads: 1, head_dim: 24 },
    Shape { n_heads: 14, n_kv_heads: 2, head_dim: 32 },
];

/// Ways of scoring.
#[derive(Clone, Copy, Debug)]
struct Kind {
    window: Option<usize>,
    capped: bool,
    sinks: bool,
}

const PLAIN: Kind = Kind { window: None, capped: false, sinks: false };

/// Windows shorter than, about as long as and longer than a block of rows.
const KINDS: [Kind; 7] = [
    PLAIN,
    Kind { window: Some(1), ..PLAIN },
    Kind { window: Some(15), ..PLAIN },
    Kind { window: Some(33), ..PLAIN },
    Kind { capped: true, ..PLAIN },
    Kind { sinks: true, ..PLAIN },
    Kind { window: Some(20), capped: true, sinks: true },
];

struct Batch {
    shape: Shape,
    cu_seqlens: Vec<u32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
    kind: Kind,
}

impl Batch {
    fn scoring(&self) -> Scoring<'_> {
        let Kind { window, capped, sinks } = self.kind;
        Scoring {
            scale: 1.0 / (self.shape.head_dim as f32).sqrt(),
            window,
            softcap: capped.then_some(2.0),
            sinks: sinks.then_some(&self.sinks),
        }
    }

    fn new(shape: Shape, lengths: &[u32], kind: Kind) -> Self {
        let mut cu_seqlens = vec![0];
        for len in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + len);
        }
        let total = *cu_seqlens.last().unwrap() as usize;
        let narrow = total * shape.n_kv_heads * shape.head_dim;
        Self {
            shape,
            cu_seqlens,
            q: noise(total * shape.n_heads * shape.head_dim, 1).iter().map(|v| v * 3.0).collect(),
            k: noise(narrow, 2),
            v: noise(narrow, 3),
            sinks: noise(shape.n_heads, 9).iter().map(|v| v * 2.0).collect(),
            kind,
        }
    }

    /// The same with keys and values as a store of `format` gives them back.
    fn rounded(&self, format: KvFormat) -> Self {
        let round = |v: &[f32]| rounded(format, v, self.shape.head_dim);
        let (k, v, sinks) = (round(&self.k), round(&self.v), self.sinks.clone());
        Self { k, v, sinks, q: self.q.clone(), cu_seqlens: self.cu_seqlens.clone(), ..*self }
    }

    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let Shape { n_heads, n_kv_heads, head_dim } = self.shape;
        let (mut out, mut lse) = (vec![0.0; self.q.len()], vec![0.0; self.q.len() / head_dim]);
        let (q, k, v, cu) = (&self.q, &self.k, &self.v, &self.cu_seqlens);
        causal_attention_forward(
            q,
            k,
            v,
            n_heads,
            n_kv_heads,
            head_dim,
            cu,
            &self.scoring(),
            &mut out,
            &mut lse,
        )
        .expect("shapes fit");
        (out, lse)
    }

    /// The same rows through a paged store whose pages lie scattered, fed in steps of `chunk` rows per sequence.
    fn paged(&self, format: KvFormat, page_tokens: usize, chunk: usize) -> Vec<f32> {
        let Shape { n_heads, n_kv_heads, head_dim } = self.shape;
        let (wide, narrow) = (n_heads * head_dim, n_kv_heads * head_dim);
        let lengths: Vec<usize> = self.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let mut next = 0;
        let mut tables: Vec<Vec<u32>> = lengths
            .iter()
            .map(|len| {
                (0..len.div_ceil(page_tokens))
                    .map(|_| {
                        next += 1;
                        next - 1
                    })
                    .collect()
            })
            .collect();
        for page in tables.iter_mut().flatten() {
            *page = next - 1 - *page;
        }
        let mut kv = KvPages::new(format, next as usize, page_tokens, n_kv_heads, head_dim).unwrap();
        // Unused slots hold NaN: nothing may look at them.
        kv.poison();
        let mut out = vec![0.0; self.q.len()];
        let longest = lengths.iter().copied().max().unwrap_or(0);
        for from in (0..longest).step_by(chunk) {
            let mut rows = Vec::new();
            let mut index = Vec::new();
            for (seq, &len) in lengths.iter().enumerate() {
                for p in from..(from + chunk).min(len) {
                    rows.push(RowRef { seq, n_keys: p + 1 });
                    index.push(self.cu_seqlens[seq] as usize + p);
                }
            }
            let take = |v: &[f32], width: usize| -> Vec<f32> {
                index.iter().flat_map(|&t| v[t * width..(t + 1) * width].to_vec()).collect()
            };
            let paging = Paging { rows: &rows, tables: &tables };
            append_kv(&mut kv, &paging, &take(&self.k, narrow), &take(&self.v, narrow)).unwrap();
            let mut part = vec![0.0; rows.len() * wide];
            paged_attention(&take(&self.q, wide), n_heads, &paging, &kv, &self.scoring(), &mut part).unwrap();
            for (row, &t) in part.chunks_exact(wide).zip(&index) {
                out[t * wide..(t + 1) * wide].copy_from_slice(row);
            }
        }
        out
    }
}

#[test]
fn forward_agrees_with_the_reference() {
    for (shape, kind) in SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind))) {
        let batch = Batch::new(shape, &[1, 40, 0, 17, 150], kind);
        let out = same_at_every_level(|| {
            let (out, lse) = batch.forward();
            [out, lse].concat()
        });
        let expected = causal(&batch.q, &batch.k, &batch.v, shape, &batch.cu_seqlens, &batch.scoring());
        assert_close(&out[..batch.q.len()], &expected, 2e-6);
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn random_shapes_agree_with_the_reference_however_they_are_fed(
        (n_kv_heads, group, head_dim) in (1usize..4, 1usize..8, 1usize..40),
        lengths in proptest::collection::vec(0u32..50, 1..4),
        window in proptest::option::of(1usize..60), capped: bool, sinks: bool,
        lines_per_page in 1usize..4, chunk in 1usize..60, format in 0..KvFormat::ALL.len(),
    ) {
        let format = KvFormat::ALL[format];
        let shape = Shape { n_heads: n_kv_heads * group, n_kv_heads, head_dim };
        let exact = Batch::new(shape, &lengths, Kind { window, capped, sinks });
        let batch = exact.rounded(format);
        let out = same_at_every_level(|| batch.forward().0);
        let expected = causal(&batch.q, &batch.k, &batch.v, shape, &batch.cu_seqlens, &batch.scoring());
        assert_close(&out, &expected, 2e-6);
        let paged = same_at_every_level(|| exact.paged(format, 16 * lines_per_page, chunk));
        proptest::prop_assert_eq!(bits(&paged), bits(&out), "{}", format);
    }
}

#[test]
fn paging_chunking_and_threads_do_not_change_a_bit() {
    for (shape, kind) in SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind))) {
        let batch = Batch::new(shape, &[270, 3, 133], kind);
        let expected = bits(&batch.forward().0);
        for (page_tokens, chunk) in [(16, 1), (16, 270), (32, 7), (48, 20)] {
            for format in KvFormat::ALL {
                assert_eq!(
                    bits(&batch.paged(format, page_tokens, chunk)),
                    bits(&batch.rounded(format).forward().0),
                    "{kind:?}: {format}, pages {page_tokens}, chunk {chunk}"
                );
            }
        }
        for threads in [1, 3] {
            assert_eq!(with_threads(threads, || bits(&batch.forward().0)), expected);
        }
    }
}

#[test]
fn rows_of_several_sequences_that_share_pages_are_as_if_alone() {
    // Four sequences have pages in common, up to different keys; the fifth has none of them.
    let (shape, page_tokens, pages) = (SHAPES[0], 32, 9);
    let shared = [9usize, 9, 6, 4, 0];
    let mut next = pages as u32;
    let tables: Vec<Vec<u32>> = shared
        .iter()
        .map(|&n| {
            let own = next..next + (pages - n) as u32;
            next = own.end;
            (0..n as u32).chain(own).collect()
        })
        .collect();
    let (wide, narrow) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
    // Every page is written once, through a sequence of its own.
    let all = [(0..next).collect::<Vec<u32>>()];
    let cells: Vec<RowRef> =
        (1..=next as usize * page_tokens).map(|n_keys| RowRef { seq: 0, n_keys }).collect();
    let (k, v) = (noise(cells.len() * narrow, 2), noise(cells.len() * narrow, 3));
    let rows: Vec<RowRef> = (0..shared.len())
        .flat_map(|seq| [130, 131, 200, 287].map(|n_keys| RowRef { seq, n_keys: n_keys - seq }))
        .collect();
    let q = noise(rows.len() * wide, 1);
    for (format, window) in KvFormat::ALL.into_iter().flat_map(|f| [None, Some(100)].map(|w| (f, w))) {
        let mut kv =
            KvPages::new(format, next as usize, page_tokens, shape.n_kv_heads, shape.head_dim).unwrap();
        append_kv(&mut kv, &Paging { rows: &cells, tables: &all }, &k, &v).unwrap();
        let scoring = Scoring { window, ..Scoring::scaled(0.125) };
        let attend = |q: &[f32], rows: &[RowRef]| {
            let mut out = vec![0.0; q.len()];
            let paging = Paging { rows, tables: &tables };
            paged_attention(q, shape.n_heads, &paging, &kv, &scoring, &mut out).unwrap();
            bits(&out)
        };
        for threads in [1, 3] {
            let together = with_threads(threads, || attend(&q, &rows));
            for ((row, q), together) in rows.iter().zip(q.chunks_exact(wide)).zip(together.chunks_exact(wide))
            {
                assert_eq!(attend(q, &[*row]), together, "{format} {window:?} {row:?}");
            }
        }
    }
}

#[test]
fn a_later_nan_does_not_reach_earlier_rows() {
    let shape = SHAPES[0];
    let mut batch = Batch::new(shape, &[20], PLAIN);
    let clean = batch.forward().0;
    let width = shape.n_kv_heads * shape.head_dim;
    batch.v[12 * width..13 * width].fill(f32::NAN);
    batch.k[12 * width..13 * width].fill(f32::INFINITY);
    let out = batch.forward().0;
    let wide = shape.n_heads * shape.head_dim;
    assert_eq!(bits(&out[..12 * wide]), bits(&clean[..12 * wide]));
    assert!(out[12 * wide..].iter().all(|v| !v.is_finite()));

    // Nor does it reach rows whose window has passed it.
    batch.kind = Kind { window: Some(4), ..PLAIN };
    let out = batch.forward().0;
    assert!(out[12 * wide..16 * wide].iter().all(|v| !v.is_finite()));
    assert!(out[16 * wide..].iter().all(|v| v.is_finite()));
}

#[test]
fn backward_is_the_derivative() {
    // Longer than one block of rows.
    let small = Shape { n_heads: 4, n_kv_heads: 2, head_dim: 8 };
    let long = Shape { n_heads: 2, n_kv_heads: 1, head_dim: 6 };
    for (shape, lengths, kind) in [
        (small, [5u32, 9].as_slice(), PLAIN),
        (long, &[70], PLAIN),
        (small, &[5, 9], Kind { window: Some(4), ..KINDS[6] }),
        (long, &[70], KINDS[6]),
    ] {
        let batch = Batch::new(shape, lengths, kind);
        let dout = noise(batch.q.len(), 4);
        let gradients = same_at_every_level(|| {
            let (out, lse) = batch.forward();
            let mut d = [vec![1.0; batch.q.len()], vec![1.0; batch.k.len()], vec![1.0; batch.v.len()]];
            let [dq, dk, dv] = &mut d;
            let Shape { n_heads, n_kv_heads, head_dim } = shape;
            causal_attention_backward(
                &batch.q,
                &batch.k,
                &batch.v,
                &out,
                &lse,
                &dout,
                n_heads,
                n_kv_heads,
                head_dim,
                &batch.cu_seqlens,
                &batch.scoring(),
                dq,
                dk,
                dv,
            )
            .unwrap();
            d.concat()
        });
        let (dq, rest) = gradients.split_at(batch.q.len());
        let (dk, dv) = rest.split_at(batch.k.len());
        let loss = |q: &[f32], k: &[f32], v: &[f32]| -> f64 {
            let out = causal(q, k, v, shape, &batch.cu_seqlens, &batch.scoring());
            out.iter().zip(&dout).map(|(o, &d)| o * f64::from(d)).sum()
        };
        let some = |n: usize| (0..n).step_by(n.div_ceil(60));
        assert_gradient(&batch.q, dq, some(dq.len()), 2e-3, |q| loss(q, &batch.k, &batch.v));
        assert_gradient(&batch.k, dk, some(dk.len()), 2e-3, |k| loss(&batch.q, k, &batch.v));
        assert_gradient(&batch.v, dv, some(dv.len()), 2e-3, |v| loss(&batch.q, &batch.k, v));
    }
}

#[test]
fn rows_outside_their_pages_are_refused() {
    let kv = KvPages::new(KvFormat::F32, 2, 16, 1, 4).unwrap();
    let tables = [vec![0u32, 1], vec![2]];
    let mut out = [0.0; 4];
    let mut attend = |row: RowRef, tables: &[Vec<u32>]| {
        let paging = Paging { rows: &[row], tables };
        paged_attention(&[0.0; 4], 1, &paging, &kv, &Scoring::scaled(1.0), &mut out)
    };
    assert!(attend(RowRef { seq: 0, n_keys: 32 }, &tables[..1]).is_ok());
    assert!(attend(RowRef { seq: 0, n_keys: 33 }, &tables[..1]).is_err());
    assert!(attend(RowRef { seq: 0, n_keys: 0 }, &tables[..1]).is_err());
    assert!(attend(RowRef { seq: 1, n_keys: 1 }, &tables[..1]).is_err());
    assert!(attend(RowRef { seq: 0, n_keys: 1 }, &tables).is_err(), "page 2 does not exist");
    assert!(KvPages::new(KvFormat::F32, 1, 8, 1, 4).is_err());
    assert!(KvPages::new(KvFormat::F32, 1, 16, 0, 4).is_err());
    assert!(check_sequences("test", &[0, 3, 2], 2).is_err());
}
