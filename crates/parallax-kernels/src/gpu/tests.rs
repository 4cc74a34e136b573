//! Every kernel against its scalar reference, on a device of wgpu; without one these tests say so and pass.

#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests: their helpers too, and what was skipped is said"
)]

mod attention;
mod linear;
mod rows;
mod source;

use std::sync::OnceLock;

use cubecl::{Device, client::Client, wgpu::WgpuDeviceKind};

use super::Values;

/// The device of the tests; a software one counts. Says on stderr that there is none.
fn device() -> Option<Client> {
    static CLIENT: OnceLock<Option<Client>> = OnceLock::new();
    let open = || match Device::wgpu(WgpuDeviceKind::DefaultDevice) {
        Ok(device) => {
            let client = device.client();
            eprintln!("device: {}", client.properties().identity.name);
            Some(client)
        }
        Err(e) => {
            eprintln!("no device: {e}; a software driver for Vulkan will do (docs/ARCHITECTURE.md, GPUs)");
            None
        }
    };
    let client = CLIENT.get_or_init(open).clone();
    if client.is_none() {
        eprintln!("skipped");
    }
    client
}

fn read(client: &Client, values: &Values) -> Vec<f32> {
    values.read(client).unwrap()
}

/// Asserts `|got - expected| <= bound * (|expected| + size)`, where `size` is the largest that was expected.
fn assert_near(got: &[f32], expected: &[f64], bound: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let size = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    assert!(size > 0.0, "{what}: nothing but zeros");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        assert!(
            error <= bound * (expected.abs() + size),
            "{what}: element {i} is {got}, expected {expected}"
        );
    }
}
