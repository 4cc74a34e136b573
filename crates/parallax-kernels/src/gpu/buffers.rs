//! Buffers that know their length.

use cubecl::{
    client::Client,
    prelude::{BufferArg, CubeElement},
    server::Handle,
};

use crate::error::{KernelError, check_len};

/// f32 values on a device.
#[derive(Clone, Debug)]
pub struct Values {
    handle: Handle,
    len: usize,
}

/// u32 values on a device: packed weights, row numbers, page tables.
#[derive(Clone, Debug)]
pub struct Ids {
    handle: Handle,
    len: usize,
}

impl Values {
    /// The first `len` values of a buffer.
    ///
    /// # Errors
    /// When the buffer is shorter.
    pub fn new(handle: Handle, len: usize) -> Result<Self, KernelError> {
        let bytes = usize::try_from(handle.size_in_used()).unwrap_or(usize::MAX);
        check_len("device buffer", "values", len, len.min(bytes / 4))?;
        Ok(Self { handle, len })
    }

    /// Uninitialised values, for kernels to write before they are read.
    pub fn empty(client: &Client, len: usize) -> Self {
        Self { handle: client.empty(len.max(1) * 4), len }
    }

    /// A copy of `values` on the device.
    pub fn upload(client: &Client, values: &[f32]) -> Self {
        let bytes = if values.is_empty() { &[0.0] } else { values };
        Self { handle: client.create_from_slice(f32::as_bytes(bytes)), len: values.len() }
    }

    /// Waits for the device and copies the values back.
    ///
    /// # Errors
    /// When a kernel that should have written them failed.
    pub fn read(&self, client: &Client) -> Result<Vec<f32>, KernelError> {
        let bytes = client
            .read_one(self.handle.clone())
            .map_err(|e| KernelError::Device { op: "read", reason: e.to_string() })?;
        Ok(f32::from_bytes(&bytes)[..self.len].to_vec())
    }

    /// How many values.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The buffer.
    pub fn into_handle(self) -> Handle {
        self.handle
    }

    pub(super) fn check(&self, op: &'static str, what: &'static str, len: usize) -> Result<(), KernelError> {
        check_len(op, what, len, self.len)
    }

    /// As an argument of a kernel.
    pub(super) fn arg(&self) -> BufferArg {
        self.vectors(1)
    }

    /// As vectors of `width` values.
    pub(super) fn vectors(&self, width: usize) -> BufferArg {
        // SAFETY: `new`, `empty` and `upload` made the buffer at least this long.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), (self.len / width).max(1)) }
    }
}

impl Ids {
    /// A copy of `ids` on the device.
    pub fn upload(client: &Client, ids: &[u32]) -> Self {
        let bytes = if ids.is_empty() { &[0] } else { ids };
        Self { handle: client.create_from_slice(u32::as_bytes(bytes)), len: ids.len() }
    }

    /// How many.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// As an argument of a kernel.
    pub(super) fn arg(&self) -> BufferArg {
        self.vectors(1)
    }

    /// As vectors of `width` values.
    pub(super) fn vectors(&self, width: usize) -> BufferArg {
        // SAFETY: `upload` made the buffer at least this long.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), (self.len / width).max(1)) }
    }
}
