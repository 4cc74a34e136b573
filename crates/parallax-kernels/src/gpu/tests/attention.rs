//! Rotation, append and attention over pages, against packed attention of the reference.

use super::{assert_near, device, read};
use crate::{
    attention::{RowRef, Scoring},
    gpu::{
        Values,
        attention::{self, DeviceRotation, DeviceRows, Heads, Store},
    },
    reference::{attention as reference, noise},
};

const PAGE: usize = 16;

/// Pages of sequences of these lengths, out of order, and how many pages there are.
fn tables(lengths: &[usize]) -> (Vec<Vec<u32>>, usize) {
    let mut next = lengths.iter().map(|n| n.div_ceil(PAGE)).sum::<usize>();
    let total = next + 1;
    let table = |n: &usize| {
        (0..n.div_ceil(PAGE))
            .map(|_| {
                next -= 1;
                next as u32
            })
            .collect()
    };
    (lengths.iter().map(table).collect(), total)
}

struct Case {
    heads: Heads,
    /// Length of each sequence, and how many of its rows were computed in earlier batches.
    sequences: Vec<(usize, usize)>,
    scale: f32,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
}

fn check(case: &Case) {
    let Some(client) = device() else { return };
    let Case { heads, sequences, scale, window, softcap, sinks } = case;
    let Heads { n_heads, n_kv_heads, head_dim } = *heads;
    let (q_width, kv_width) = (n_heads * head_dim, n_kv_heads * head_dim);
    let lengths: Vec<usize> = sequences.iter().map(|s| s.0).collect();
    let total: usize = lengths.iter().sum();
    let (q, k, v) = (noise(total * q_width, 1), noise(total * kv_width, 2), noise(total * kv_width, 3));
    let sinks: Option<Vec<f32>> = sinks.then(|| noise(n_heads, 4));
    let scoring = Scoring { scale: *scale, window: *window, softcap: *softcap, sinks: sinks.as_deref() };
    let bounds = lengths.iter().scan(0, |sum, n| {
        *sum += *n as u32;
        Some(*sum)
    });
    let cu_seqlens: Vec<u32> = std::iter::once(0).chain(bounds).collect();
    let shape = reference::Shape { n_heads, n_kv_heads, head_dim };
    let whole = reference::causal(&q, &k, &v, shape, &cu_seqlens, &scoring);

    let (tables, n_pages) = tables(&lengths);
    let zeros = vec![0.0; n_pages * PAGE * kv_width];
    let (keys, values) = (Values::upload(&client, &zeros), Values::upload(&client, &zeros));
    let store = Store { keys: &keys, values: &values, page_tokens: PAGE };
    // What was computed earlier, then the rest of every sequence in one batch.
    for later in [false, true] {
        let (mut rows, mut fused, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for (seq, (n, early)) in sequences.iter().enumerate() {
            let range = if later { *early..*n } else { 0..*early };
            for position in range {
                let t = cu_seqlens[seq] as usize + position;
                rows.push(RowRef { seq, n_keys: position + 1 });
                fused.extend_from_slice(&q[t * q_width..][..q_width]);
                fused.extend_from_slice(&k[t * kv_width..][..kv_width]);
                fused.extend_from_slice(&v[t * kv_width..][..kv_width]);
                expected.extend_from_slice(&whole[t * q_width..][..q_width]);
            }
        }
        if rows.is_empty() {
            continue;
        }
        let on_device = DeviceRows::new(&client, &rows, &tables, PAGE).unwrap();
        let fused = Values::upload(&client, &fused);
        let q = attention::append(&client, &fused, *heads, None, &on_device, store).unwrap();
        let out = attention::attend(&client, &q, *heads, &on_device, store, &scoring).unwrap();
        let what = format!("{heads:?} {sequences:?} window {window:?} cap {softcap:?} later {later}");
        assert_near(&read(&client, &out), &expected, 4e-6, &what);
    }
}

fn case(n_heads: usize, n_kv_heads: usize, head_dim: usize, sequences: &[(usize, usize)]) -> Case {
    let heads = Heads { n_heads, n_kv_heads, head_dim };
    let scale = 2.0 / (head_dim as f32).sqrt();
    Case { heads, sequences: sequences.to_vec(), scale, window: None, softcap: None, sinks: false }
}

#[test]
fn prompts_and_decode_steps_of_grouped_heads() {
    // One row each at the end: decode. Lengths around the blocks of 128 and the chunks of 256 keys.
    check(&case(9, 3, 64, &[(129, 128), (1, 0), (300, 299)]));
    check(&case(4, 4, 8, &[(40, 3), (257, 250)]));
    check(&case(8, 1, 128, &[(130, 100)]));
    // A head that is no multiple of four, and more heads to a key than a cube takes.
    check(&case(15, 1, 10, &[(33, 20), (7, 0)]));
    check(&case(2, 2, 256, &[(20, 19), (50, 40)]));
}

#[test]
fn windows_caps_and_sinks() {
    let base = || case(6, 2, 16, &[(600, 590), (300, 280), (9, 0)]);
    check(&Case { window: Some(5), ..base() });
    check(&Case { window: Some(300), sinks: true, ..base() });
    check(&Case { softcap: Some(3.0), ..base() });
    check(&Case { window: Some(130), softcap: Some(0.7), sinks: true, ..base() });
}

#[test]
fn pairs_are_rotated_and_rows_land_in_their_pages() {
    let Some(client) = device() else { return };
    let heads = Heads { n_heads: 3, n_kv_heads: 1, head_dim: 10 };
    let (tables, n_pages) = tables(&[20, 5]);
    let rows: Vec<RowRef> =
        (15..20).map(|p| RowRef { seq: 0, n_keys: p + 1 }).chain([RowRef { seq: 1, n_keys: 1 }]).collect();
    let (pairs, width) = (4, 50);
    let (fused, angles) = (noise(rows.len() * width, 1), noise(rows.len() * pairs * 2, 2));
    for interleaved in [false, true] {
        let rotation = DeviceRotation::new(&client, &angles, pairs, interleaved).unwrap();
        let on_device = DeviceRows::new(&client, &rows, &tables, PAGE).unwrap();
        let zeros = vec![0.0; n_pages * PAGE * 10];
        let (keys, values) = (Values::upload(&client, &zeros), Values::upload(&client, &zeros));
        let store = Store { keys: &keys, values: &values, page_tokens: PAGE };
        let uploaded = Values::upload(&client, &fused);
        let q = attention::append(&client, &uploaded, heads, Some(&rotation), &on_device, store).unwrap();
        let (mut all_q, mut all_k) = (Vec::new(), vec![0.0f64; zeros.len()]);
        let mut all_v = all_k.clone();
        for (t, row) in fused.chunks(width).enumerate() {
            let mut turned: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
            for head in turned.chunks_mut(10).take(4) {
                for pair in 0..pairs {
                    let (i, j) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
                    let angle = |n: usize| f64::from(angles[(t * pairs + pair) * 2 + n]);
                    let (a, b) = (head[i], head[j]);
                    (head[i], head[j]) = (a * angle(0) - b * angle(1), b * angle(0) + a * angle(1));
                }
            }
            let position = rows[t].n_keys - 1;
            let slot = tables[rows[t].seq][position / PAGE] as usize * PAGE + position % PAGE;
            all_q.extend_from_slice(&turned[..30]);
            all_k[slot * 10..][..10].copy_from_slice(&turned[30..40]);
            all_v[slot * 10..][..10].copy_from_slice(&turned[40..]);
        }
        assert_near(&read(&client, &q), &all_q, 1e-6, "queries");
        assert_near(&read(&client, &keys), &all_k, 1e-6, "keys");
        assert_near(&read(&client, &values), &all_v, 1e-7, "values");
    }
}

#[test]
fn pages_are_copied_and_bad_rows_refused() {
    let Some(client) = device() else { return };
    let mut expected = noise(6 * 8, 1);
    let data = Values::upload(&client, &expected);
    attention::copy_rows(&client, &data, 8, 4, 1, 2).unwrap();
    expected.copy_within(32..48, 8);
    assert_eq!(read(&client, &data), expected);
    assert!(attention::copy_rows(&client, &data, 8, 5, 1, 2).is_err());
    assert!(attention::copy_rows(&client, &data, 8, 0, 1, 2).is_err());

    let refuse = |row| DeviceRows::new(&client, &[row], &[vec![1]], PAGE).unwrap_err().to_string();
    assert!(refuse(RowRef { seq: 1, n_keys: 1 }).contains("number of keys"));
    assert!(refuse(RowRef { seq: 0, n_keys: 17 }).contains("number of keys"));
    // A page that the store does not have.
    let rows = DeviceRows::new(&client, &[RowRef { seq: 0, n_keys: 1 }], &[vec![1]], PAGE).unwrap();
    let heads = Heads { n_heads: 1, n_kv_heads: 1, head_dim: 4 };
    let small = Values::upload(&client, &[0.0; PAGE * 4]);
    let store = Store { keys: &small, values: &small, page_tokens: PAGE };
    let q = Values::upload(&client, &[0.0; 4]);
    let refused = attention::attend(&client, &q, heads, &rows, store, &Scoring::scaled(1.0)).unwrap_err();
    assert!(refused.to_string().contains("page"), "{refused}");
}
