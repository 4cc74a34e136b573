//! Who is here: sessions, their models and their samplers. Time is an argument.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::store::SavedPath;
use super::training::ModelSlot;

/// What a sampling session samples from.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SamplerSlot {
    pub(super) session: String,
    /// `None`: the base model.
    pub(super) path: Option<SavedPath>,
    /// Copies of its client that have joined; the first client is 0.
    pub(super) joined: u64,
}

/// Everything by its name. A session that ends takes what is its own along.
#[derive(Debug, Default)]
pub(super) struct Registry {
    /// When each was last heard of.
    sessions: BTreeMap<String, Instant>,
    models: BTreeMap<String, Arc<ModelSlot>>,
    samplers: BTreeMap<String, SamplerSlot>,
}

/// Most of each kind, and how long a silent session stays where there is no room.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) sessions: usize,
    pub(super) models: usize,
    pub(super) samplers: usize,
    pub(super) timeout: Duration,
}

/// Why something was not added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Its session has ended: nobody would ever end it.
    #[error("no such session; it has ended, or this server was started again")]
    NoSession,
    /// As many as there may be.
    #[error("as many are open as this server allows: try again later")]
    NoRoom,
}

impl Registry {
    /// Adds a session; false when there is no room.
    pub(super) fn open_session(&mut self, id: &str, now: Instant, room: &Room) -> bool {
        if self.sessions.len() >= room.sessions {
            self.expire(now, room);
        }
        let fits = self.sessions.len() < room.sessions;
        if fits {
            self.sessions.insert(id.to_owned(), now);
        }
        fits
    }

    /// Notes that a session was heard of; false when there is none.
    pub(super) fn touch(&mut self, id: &str, now: Instant) -> bool {
        self.sessions.get_mut(id).map(|seen| *seen = now).is_some()
    }

    /// Ends a session and all that is its own.
    pub(super) fn finish(&mut self, id: &str) {
        self.sessions.remove(id);
        self.models.retain(|_, model| {
            let stays = model.session != id;
            if !stays {
                model.close();
            }
            stays
        });
        self.samplers.retain(|_, sampler| sampler.session != id);
    }

    fn expire(&mut self, now: Instant, room: &Room) {
        let silent = |seen: &Instant| now.saturating_duration_since(*seen) > room.timeout;
        let gone: Vec<String> =
            self.sessions.iter().filter(|(_, seen)| silent(seen)).map(|(id, _)| id.clone()).collect();
        gone.iter().for_each(|id| self.finish(id));
    }

    /// Adds a model, or finds the one of this id; true when it is new.
    pub(super) fn add_model(
        &mut self,
        model: Arc<ModelSlot>,
        now: Instant,
        room: &Room,
    ) -> Result<(Arc<ModelSlot>, bool), Refused> {
        if !self.touch(&model.session, now) {
            return Err(Refused::NoSession);
        }
        if let Some(known) = self.models.get(&model.id) {
            return Ok((Arc::clone(known), false));
        }
        if self.models.len() >= room.models {
            self.expire(now, room);
        }
        if self.models.len() >= room.models {
            return Err(Refused::NoRoom);
        }
        self.models.insert(model.id.clone(), Arc::clone(&model));
        Ok((model, true))
    }

    /// The model of this id, whose session is heard of thereby.
    pub(super) fn model(&mut self, id: &str, now: Instant) -> Option<Arc<ModelSlot>> {
        let model = self.models.get(id).cloned()?;
        self.touch(&model.session, now);
        Some(model)
    }

    /// Adds a sampling session; one that is there stays as it is.
    pub(super) fn open_sampler(
        &mut self,
        id: &str,
        slot: SamplerSlot,
        now: Instant,
        room: &Room,
    ) -> Result<(), Refused> {
        if !self.touch(&slot.session, now) {
            return Err(Refused::NoSession);
        }
        if self.samplers.len() >= room.samplers {
            self.expire(now, room);
        }
        if !self.samplers.contains_key(id) && self.samplers.len() >= room.samplers {
            return Err(Refused::NoRoom);
        }
        self.samplers.entry(id.to_owned()).or_insert(slot);
        Ok(())
    }

    /// The sampling session of this id, whose session is heard of thereby.
    pub(super) fn sampler(&mut self, id: &str, now: Instant) -> Option<&mut SamplerSlot> {
        let sampler = self.samplers.get_mut(id)?;
        if let Some(seen) = self.sessions.get_mut(&sampler.session) {
            *seen = now;
        }
        Some(sampler)
    }

    /// Ends everything.
    pub(super) fn close(&mut self) {
        self.models.values().for_each(|model| model.close());
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::super::store::LoraSpec;
    use super::*;

    const ROOM: Room = Room { sessions: 2, models: 1, samplers: 1, timeout: Duration::from_secs(10) };

    fn model(id: &str, session: &str) -> Arc<ModelSlot> {
        let lora = LoraSpec { rank: 1, attention: true, mlp: true };
        Arc::new(ModelSlot::new(id.to_owned(), session.to_owned(), lora, 4))
    }

    #[test]
    fn silent_sessions_make_room_and_take_along_what_is_their_own() {
        let (mut registry, start) = (Registry::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(registry.open_session("a", at(0), &ROOM) && registry.open_session("b", at(0), &ROOM));
        let is_new = |added: Result<(Arc<ModelSlot>, bool), Refused>| added.map(|(_, new)| new);
        assert_eq!(is_new(registry.add_model(model("m", "a"), at(1), &ROOM)), Ok(true));
        assert_eq!(is_new(registry.add_model(model("m", "a"), at(1), &ROOM)), Ok(false), "asked for twice");
        let slot = SamplerSlot { session: "a".to_owned(), path: None, joined: 0 };
        assert_eq!(registry.open_sampler("s", slot.clone(), at(1), &ROOM), Ok(()));
        assert_eq!(registry.open_sampler("s", slot.clone(), at(1), &ROOM), Ok(()), "the same once more");
        assert_eq!(registry.open_sampler("t", slot.clone(), at(1), &ROOM), Err(Refused::NoRoom));
        assert!(!registry.open_session("c", at(5), &ROOM));
        assert_eq!(is_new(registry.add_model(model("n", "b"), at(5), &ROOM)), Err(Refused::NoRoom));
        assert!(registry.touch("b", at(9)) && !registry.touch("c", at(9)));
        assert!(registry.model("m", at(8)).is_some());
        assert!(!registry.open_session("c", at(18), &ROOM), "a was heard of with its model");
        assert!(registry.open_session("c", at(19), &ROOM));
        assert!(registry.model("m", at(19)).is_none() && registry.sampler("s", at(19)).is_none());
        assert_eq!(is_new(registry.add_model(model("n", "a"), at(19), &ROOM)), Err(Refused::NoSession));
        assert_eq!(registry.open_sampler("s", slot, at(19), &ROOM), Err(Refused::NoSession));
        assert_eq!(is_new(registry.add_model(model("n", "c"), at(19), &ROOM)), Ok(true));
        registry.finish("c");
        assert!(registry.model("n", at(19)).is_none());
    }
}
