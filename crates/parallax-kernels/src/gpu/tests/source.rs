//! Every kernel as WGSL, which naga validates, and as CUDA C: no device is needed. What a kernel is compiled for is tried
//! in all its values, or in those that differ most.

use std::sync::Arc;

use cubecl::{
    Compiler, CubeKernel,
    ir::{DeviceIdentity, HardwareProperties, MemoryDeviceProperties, TargetProperties},
    prelude::*,
    profile::TimingMethod,
    server::Handle,
    wgpu::WgslCompiler,
};
use cubecl_common::device::{DeviceId, ServiceId};
use cubecl_cpp::{shared::CppCompiler, target::Cuda};
use cubecl_environment::stream::StreamId;

use crate::{
    WeightKind,
    activation::Activation,
    gpu::{
        activation::gated_elements,
        attention::chunks::{Shape, attend_chunk, copy_values, merge_chunks, rotate_append},
        linear::{few_rows, many_rows, table_rows},
        norm::{norm_rows, norm_spans},
        widen::Form,
    },
};

/// A device that is nowhere: what every device has, and what is asked while a kernel is defined.
fn properties() -> Arc<DeviceProperties> {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 16,
        max_shared_memory_size: 16 << 10,
        max_cube_count: (65_535, 65_535, 65_535),
        max_units_per_cube: 256,
        max_cube_dim: (256, 256, 64),
        num_streaming_multiprocessors: None,
        num_cpu_cores: None,
        last_level_cache_size: None,
        num_tensor_cores: None,
        min_tensor_cores_dim: None,
        max_vector_size: 4,
        cube_mma_reserved_shared_memory: 0,
    };
    let name = "none".to_owned();
    let identity = DeviceIdentity { fingerprint: name.clone(), name, physical: None };
    let memory = MemoryDeviceProperties::new(1 << 30, 256);
    let mut properties =
        DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System, identity);
    cubecl_cpp::register_supported_types(&mut properties);
    Arc::new(properties)
}

fn buffer() -> BufferArg {
    let service = ServiceId::of::<()>(DeviceId::new(0, 0));
    let handle = Handle::new(service, StreamId { value: 0 }, 1024);
    // SAFETY: the buffer is 1024 bytes long, and no kernel is started.
    unsafe { BufferArg::from_raw_parts(handle, 64) }
}

/// Compiles for both languages; asserts that what comes out is a kernel with `buffers` buffers.
fn compile(kernel: &impl CubeKernel, buffers: usize, what: &str) {
    let wgsl = WgslCompiler.compile(kernel.define(), &Default::default());
    let wgsl = wgsl.unwrap_or_else(|e| panic!("{what} as WGSL: {e}")).to_string();
    let module = naga::front::wgsl::parse_str(&wgsl);
    let module = module.unwrap_or_else(|e| panic!("{what}: {}\n{wgsl}", e.emit_to_string(&wgsl)));
    let all = (naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
    if let Err(e) = naga::valid::Validator::new(all.0, all.1).validate(&module) {
        panic!("{what}: {}\n{wgsl}", e.emit_to_string(&wgsl));
    }
    let storage = |space| matches!(space, naga::AddressSpace::Storage { .. });
    let bound = module.global_variables.iter().filter(|(_, v)| storage(v.space)).count();
    assert!(bound >= buffers, "{what}: {bound} buffers\n{wgsl}");

    let cuda = CppCompiler::<Cuda>::default().compile(kernel.define(), &Default::default());
    let cuda = cuda.unwrap_or_else(|e| panic!("{what} as CUDA C: {e}")).to_string();
    assert!(cuda.contains("__global__"), "{what}: {cuda}");
}

/// `$kernel` with a grid of one cube of `$units`, buffers for the arguments.
macro_rules! dummy {
    ($kernel:ident, $units:expr, $($arg:expr),* $(,)?) => {
        $kernel::create_dummy_kernel(
            properties(),
            Arc::new(TargetProperties::default()),
            CubeCount::Static(1, 1, 1),
            $units,
            $($arg),*
        )
    };
}

/// The two kernels of products have the same arguments.
macro_rules! product {
    ($kernel:ident, $units:expr, $form:expr, $rows:expr) => {
        dummy!(
            $kernel,
            $units,
            $form.words(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            1,
            1,
            32,
            1,
            0,
            $rows,
            $form,
        )
    };
}

#[test]
fn products_compile_for_every_format() {
    for kind in WeightKind::ALL {
        let form = Form::of(kind);
        for rows in [1, 2, 4] {
            compile(
                &product!(few_rows, CubeDim::new_2d(32, 4), form, rows),
                4,
                &format!("{rows} rows of {kind:?}"),
            );
            let many = product!(many_rows, CubeDim::new_2d(16, 16), form, rows);
            compile(&many, 4, &format!("{rows} rows per unit of {kind:?}"));
        }
        let kernel = dummy!(
            table_rows,
            CubeDim::new_1d(64),
            form.words(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            1,
            32,
            form
        );
        compile(&kernel, 4, &format!("rows of {kind:?}"));
    }
}

#[test]
fn attention_compiles_for_every_shape_of_heads() {
    for interleaved in [false, true] {
        let kernel = dummy!(
            rotate_append,
            CubeDim::new_1d(128),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            buffer(),
            1,
            1,
            1,
            2,
            1,
            interleaved,
        );
        compile(&kernel, 6, "rotation");
    }
    // Sixteen-bit-free models from 135M to 70B: heads, key heads, elements, heads and rows of a cube, elements at a time.
    let shapes = [
        (9, 3, 64, 3, 1, 4),
        (9, 3, 64, 3, 2, 4),
        (32, 8, 128, 4, 2, 4),
        (8, 4, 256, 2, 3, 4),
        (3, 3, 10, 1, 8, 1),
    ];
    for (n_heads, n_kv_heads, head_dim, heads, rows, width) in shapes {
        for flags in 0..4 {
            let (capped, windowed) = (flags & 1 != 0, flags & 2 != 0);
            let shape = Shape { n_heads, n_kv_heads, head_dim, heads, rows, capped, windowed };
            let kernel = dummy!(
                attend_chunk,
                CubeDim::new_1d(128),
                width,
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                0,
                0,
                0,
                16,
                1.0,
                1.0,
                1,
                shape,
            );
            compile(&kernel, 7, &format!("{shape:?}"));
            let kernel = dummy!(
                merge_chunks,
                CubeDim::new_1d(128),
                buffer(),
                buffer(),
                buffer(),
                buffer(),
                1,
                0,
                0,
                1,
                1,
                capped,
                shape,
            );
            compile(&kernel, 3, &format!("merge of {shape:?}"));
        }
    }
    compile(&dummy!(copy_values, CubeDim::new_1d(128), buffer(), 0, 1, 1), 1, "copy");
}

#[test]
fn the_small_kernels_compile() {
    let kernel = dummy!(norm_rows, CubeDim::new_1d(128), buffer(), buffer(), buffer(), 1, 1, 1e-5);
    compile(&kernel, 3, "norm");
    let kernel = dummy!(norm_spans, CubeDim::new_1d(128), buffer(), buffer(), 1, 1, 1, 1, 0, 1e-5);
    compile(&kernel, 2, "norm of spans");
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let kernel = dummy!(gated_elements, CubeDim::new_1d(64), buffer(), buffer(), 1, 1, activation);
        compile(&kernel, 2, "gated product");
    }
}
