//! Norms and the gated activation.

use super::{assert_near, device, read};
use crate::{
    activation::Activation,
    gpu::{Values, activation, norm},
    reference::{noise, rows},
};

#[test]
fn norms_are_those_of_the_reference() {
    let Some(client) = device() else { return };
    for (n_rows, width) in [(1, 1), (3, 33), (5, 576), (2, 129), (70, 64)] {
        let (x, w) = (noise(n_rows * width, 1), noise(width, 2));
        let y = norm::rms_norm(&client, &Values::upload(&client, &x), &Values::upload(&client, &w), 1e-5);
        let expected: Vec<f64> = x.chunks(width).flat_map(|x| rows::rms_norm(x, &w, 1e-5)).collect();
        assert_near(&read(&client, &y.unwrap()), &expected, 1e-6, &format!("{n_rows} rows of {width}"));
    }
}

#[test]
fn spans_are_normalised_and_the_rest_stays() {
    let Some(client) = device() else { return };
    let (width, first, spans, span) = (7 + 3 * 20 + 5, 7, 3, 20);
    let (x, w) = (noise(4 * width, 3), noise(span, 4));
    let data = Values::upload(&client, &x);
    norm::rms_norm_spans(&client, &data, width, first, spans, &Values::upload(&client, &w), 1e-6).unwrap();
    let mut expected: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    for (row, to) in x.chunks(width).zip(expected.chunks_mut(width)) {
        for i in 0..spans {
            let at = first + i * span;
            to[at..at + span].copy_from_slice(&rows::rms_norm(&row[at..at + span], &w, 1e-6));
        }
    }
    assert_near(&read(&client, &data), &expected, 1e-6, "spans");
    let long = norm::rms_norm_spans(&client, &data, width, 20, spans, &Values::upload(&client, &w), 1e-6);
    assert!(long.unwrap_err().to_string().contains("inside the row"));
}

#[test]
fn gated_products_are_those_of_the_reference() {
    let Some(client) = device() else { return };
    for (n_rows, ffn) in [(1, 1), (3, 65), (9, 128)] {
        // Some gates are far from zero: exponentials over- and underflow there.
        let x: Vec<f32> = noise(n_rows * 2 * ffn, 5).iter().map(|v| v * v * v * 100.0).collect();
        for kind in [Activation::Silu, Activation::GeluTanh] {
            let y = activation::gated_mul(&client, kind, &Values::upload(&client, &x), ffn).unwrap();
            let one = if kind == Activation::Silu { rows::silu_mul } else { rows::gelu_tanh_mul };
            let expected: Vec<f64> = x
                .chunks(2 * ffn)
                .flat_map(|row| (0..ffn).map(|i| one(row[i], row[ffn + i])).collect::<Vec<_>>())
                .collect();
            assert_near(&read(&client, &y), &expected, 2e-6, &format!("{kind:?} {n_rows} rows of {ffn}"));
        }
    }
}
