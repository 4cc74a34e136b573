//! Bringing adapters to the stages of a pipeline.

use std::sync::Arc;

use swarm_wire::PolicyVersion;
use swarm_wire::generated::parallax::v1::{StageAdapter, stage_frame};
use swarm_wire::limits::TENSOR_MAX_BYTES;

use super::link::Link;
use super::{PipelineRunner, WantedAdapter};
use crate::adapter_file::AdapterFile;
use crate::error::StageError;
use crate::service::stage_server::frame::EncodedFrame;

/// Whether stages take an adapter of so many bytes.
pub(super) fn check_size(bytes: usize) -> Result<(), String> {
    if bytes > TENSOR_MAX_BYTES {
        return Err(format!("it has {bytes} bytes, stages take at most {TENSOR_MAX_BYTES}"));
    }
    Ok(())
}

impl PipelineRunner {
    /// The adapter of a version to all stages.
    pub(super) fn send_adapter(
        &mut self,
        link: &Arc<Link>,
        (version, file): &WantedAdapter,
    ) -> Result<(), StageError> {
        let version = *version;
        if link.local.is_some()
            && let Some(runner) = self.shared.own.runner().as_mut()
        {
            runner.set_adapter(version, file.as_ref())?;
        }
        self.send_bytes(link, version, 0, file.as_deref().unwrap_or_default())?;
        self.adapter_sent = Some(version);
        Ok(())
    }

    /// A resident adapter to all stages; without one it goes.
    pub(super) fn send_resident(
        &mut self,
        link: &Arc<Link>,
        id: u32,
        file: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        if link.local.is_some()
            && let Some(runner) = self.shared.own.runner().as_mut()
        {
            match file {
                None => runner.remove_adapter(id),
                Some(file) => runner.add_adapter(id, file)?,
            }
        }
        self.send_bytes(link, PolicyVersion(0), id, file.map_or(&[], |file| &**file))
    }

    fn send_bytes(
        &mut self,
        link: &Arc<Link>,
        version: PolicyVersion,
        resident: u32,
        bytes: &[u8],
    ) -> Result<(), StageError> {
        if link.remote.is_none() {
            return Ok(());
        }
        self.next_step += 1;
        let step_id = self.next_step;
        let kind = stage_frame::Kind::Adapter(StageAdapter { step_id, version: version.0, resident });
        self.exchange(link, EncodedFrame::with_bytes(kind, bytes), step_id)?;
        Ok(())
    }
}
