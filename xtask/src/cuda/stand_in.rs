//! Stands in for cubecl-llvm, whose build downloads LLVM: the types that cubecl-cuda names, and no compiler behind them. With
//! the feature `cpp` of cubecl-cuda the compiler is NVRTC, and nothing here is called.

/// PTX by LLVM.
pub mod nvptx {
    /// The version of PTX that a driver takes.
    pub mod ptx_version {
        /// None: no PTX is made here.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum PtxVersion {}

        impl PtxVersion {
            /// No version.
            pub fn for_driver(_driver: i32) -> Option<Self> {
                None
            }
        }

        impl std::fmt::Display for PtxVersion {
            fn fmt(&self, _f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {}
            }
        }
    }
}

/// What LLVM's back ends have in common.
pub mod shared {
    /// What a device can do, less what LLVM cannot say.
    pub mod lowered_features {
        use cubecl_core::ir::DeviceProperties;

        /// A family of GPUs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum GpuTarget {
            /// NVIDIA's.
            Nvptx,
        }

        /// Leaves everything, since nothing is compiled here.
        pub fn restrict_features(_properties: &mut DeviceProperties, _target: GpuTarget) {}
    }
}

use cubecl_core::{
    CompilationError,
    ir::{attributes::BufferIOAttr, nvidia::SmArch},
    prelude::KernelDefinition,
};
use cubecl_environment::backtrace::BackTrace;

/// What is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LlvmTarget {
    /// NVIDIA's GPUs.
    Nvptx,
}

/// How it is compiled.
#[derive(Clone, Debug, Default)]
pub struct PlironOptions {
    /// Of AMD's GPUs.
    pub arch: Option<std::convert::Infallible>,
    /// Of NVIDIA's GPUs.
    pub sm_arch: Option<SmArch>,
    /// The version of PTX.
    pub ptx_version: Option<nvptx::ptx_version::PtxVersion>,
    /// Where scalars are passed.
    pub grid_constants: bool,
}

/// A kernel as PTX.
#[derive(Clone, Debug)]
pub struct NvptxModule {
    /// PTX, ended by zero.
    pub ptx: Vec<std::ffi::c_char>,
    /// LLVM's own language.
    pub ir: String,
    /// Bytes.
    pub shared_memory_size: usize,
    /// How buffers are used.
    pub io: Vec<BufferIOAttr>,
}

/// A compiled kernel.
#[derive(Clone, Debug)]
pub enum PlironArtifact {
    /// For NVIDIA's GPUs.
    NvptxCode(NvptxModule),
}

/// The compiler that is not there.
#[derive(Clone, Debug)]
pub struct PlironCompiler {
    /// What it would compile for.
    pub target: LlvmTarget,
}

impl PlironCompiler {
    /// Compiles nothing.
    pub fn compile(
        &mut self,
        _kernel: KernelDefinition,
        _options: &PlironOptions,
    ) -> Result<PlironArtifact, CompilationError> {
        Err(CompilationError::Generic {
            reason: "this program was built without LLVM; NVRTC compiles its kernels".to_owned(),
            backtrace: BackTrace::capture(),
        })
    }

    /// The language that it would write.
    pub fn lang_tag(&self) -> &'static str {
        "ptx"
    }
}
