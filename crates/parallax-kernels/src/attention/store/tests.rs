//! What a store gives back: how far from what was stored, and how large it is.

use super::*;
use crate::attention::{Scoring, append_kv, paged_attention};
use crate::testing::{bits, noise, rounded};

/// What the store holds of rows [T, D], one head, read back as the only key of an attention: its value.
fn read_back(format: KvFormat, rows: &[f32], d: usize) -> Vec<f32> {
    let n = rows.len() / d;
    let mut kv = KvPages::new(format, n, 16, 1, d).unwrap();
    let tables: Vec<Vec<u32>> = (0..n as u32).map(|page| vec![page]).collect();
    let places: Vec<RowRef> = (0..n).map(|seq| RowRef { seq, n_keys: 1 }).collect();
    let paging = Paging { rows: &places, tables: &tables };
    let zeros = vec![0.0; rows.len()];
    append_kv(&mut kv, &paging, &zeros, rows).unwrap();
    let mut out = zeros.clone();
    paged_attention(&zeros, 1, &paging, &kv, &Scoring::scaled(1.0), &mut out).unwrap();
    out
}

proptest::proptest! {
    #[test]
    fn numbers_stay_within_the_bounds_of_their_format(
        rows in 1usize..6, d in 1usize..100, seed in 0u64..1000, exponent in -100i32..120,
    ) {
        let values: Vec<f32> = noise(rows * d, seed).iter().map(|v| v * 2f32.powi(exponent)).collect();
        proptest::prop_assert_eq!(&read_back(KvFormat::F32, &values, d), &values);
        for format in [KvFormat::Bf16, KvFormat::Q8] {
            let got = read_back(format, &values, d);
            proptest::prop_assert_eq!(&got, &rounded(format, &values, d), "{}", format);
            for (got, values) in got.chunks(d).zip(values.chunks(d)) {
                for (got, values) in got.chunks(BLOCK).zip(values.chunks(BLOCK)) {
                    let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                    for (g, v) in got.iter().zip(values) {
                        let bound = if format == KvFormat::Q8 { 0.51 / 127.0 * largest } else { v.abs() / 256.0 };
                        proptest::prop_assert!((g - v).abs() <= bound, "{format}: {g} for {v} below {largest}");
                    }
                }
            }
        }
    }
}

#[test]
fn zeros_come_back_and_what_is_not_finite_does_not_vanish() {
    for format in KvFormat::ALL {
        assert_eq!(read_back(format, &[0.0; 40], 40), [0.0; 40]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = vec![1.0; 40];
            row[33] = bad;
            let got = read_back(format, &row, 40);
            assert!(!got[33].is_finite(), "{format}: {bad} became {}", got[33]);
            assert!(got[..32].iter().all(|v| (v - 1.0).abs() < 0.51 / 127.0));
        }
    }
    assert!((read_back(KvFormat::Q8, &[f32::MAX; 3], 3)[0] / f32::MAX - 1.0).abs() < 0.01);
}

#[test]
fn sizes_are_those_of_the_rows() {
    let (pages, tokens, heads, d) = (3, 32, 2, 64);
    for (format, per_row) in [(KvFormat::F32, 256), (KvFormat::Bf16, 128), (KvFormat::Q8, 68)] {
        let kv = KvPages::new(format, pages, tokens, heads, d).unwrap();
        assert_eq!(format.row_bytes(d), per_row);
        assert_eq!(kv.bytes(), pages * tokens * heads * 2 * per_row);
        assert_eq!((kv.n_pages(), kv.format()), (pages, format));
    }
}

#[test]
fn pages_are_copied_whole_and_only_where_they_are() {
    for format in KvFormat::ALL {
        let mut kv = KvPages::new(format, 3, 16, 2, 8).unwrap();
        kv.poison();
        let place = [RowRef { seq: 0, n_keys: 4 }];
        let (k, v) = (noise(16, 1), noise(16, 2));
        for n_keys in 1..=4 {
            let rows = [RowRef { seq: 0, n_keys }];
            append_kv(&mut kv, &Paging { rows: &rows, tables: &[vec![2]] }, &k, &v).unwrap();
        }
        kv.copy_page(2, 0).unwrap();
        let read = |page| {
            let mut out = vec![0.0; 16];
            let paging = Paging { rows: &place, tables: &[vec![page]] };
            paged_attention(&k, 2, &paging, &kv, &Scoring::scaled(1.0), &mut out).unwrap();
            out
        };
        assert_eq!(bits(&read(0)), bits(&read(2)), "{format}");
        assert!(read(0).iter().all(|v| v.is_finite()) && read(1).iter().all(|v| v.is_nan()));
        assert!(kv.copy_page(0, 3).is_err());
    }
}

#[test]
fn names_are_read_back() {
    for format in KvFormat::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
    }
    assert!("q4".parse::<KvFormat>().unwrap_err().contains("f32, bf16, q8"));
}
