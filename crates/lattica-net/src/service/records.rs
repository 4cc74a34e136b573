//! Signed records of the DHT, as the application has them.

use std::time::Duration;

use bytes::Bytes;
use swarm_wire::PeerId;

use super::Node;
use super::driver::Command;
use crate::dht::SignedRecord;
use crate::error::DhtError;

impl Node {
    /// Publishes `value` (at most 32 KiB) under `name` (at most 255 bytes) in the DHT, signed by this node, in place of what it
    /// published there before: nobody else can change it. It counts for `ttl` (a minute to a day), by the clocks of those who
    /// keep and read it, and is put again every third of that while the node runs, and soon where nobody stored it, until
    /// [`Node::unpublish_record`]. At most 256 names.
    ///
    /// Cancel safe: what has begun goes on, and it is put again all the same.
    ///
    /// # Errors
    /// [`DhtError::Unfit`] when something is out of range; nothing is published then. Any other error says that nobody is known
    /// to have stored it yet: nobody is there, none accepts it in time (a record of another start of this node, whose clock was
    /// ahead, may stand in its way until it expires), too many queries run, or the own store is full. It is put again all the
    /// same, unless it was replaced or taken back meanwhile.
    pub async fn publish_record(&self, name: &str, value: Bytes, ttl: Duration) -> Result<(), DhtError> {
        let name = name.to_owned();
        self.query(|reply| Command::PublishRecord { name, value, ttl, reply }).await
    }

    /// Puts the record of `name` no more; what others keep expires by itself.
    ///
    /// Cancel safe: it is taken back or not.
    pub async fn unpublish_record(&self, name: &str) {
        let _ = self.shared().command(Command::UnpublishRecord { name: name.to_owned() }).await;
    }

    /// The newest record that `publisher` published under `name`, as far as those know it who keep it; `None` when nobody has
    /// one that counts. All of them are asked, which takes longer than [`Node::get_record`]; answers that are forged, expired
    /// or from too far ahead are not used, and a log line names who gave them.
    ///
    /// Cancel safe: a question that has been asked is answered to nobody.
    ///
    /// # Errors
    /// When the query is not answered in time and nothing was found, or too many queries run.
    pub async fn published_record(
        &self,
        publisher: &PeerId,
        name: &str,
    ) -> Result<Option<SignedRecord>, DhtError> {
        let (publisher, name) = (publisher.clone(), name.to_owned());
        self.query(|reply| Command::PublishedRecord { publisher, name, reply }).await
    }
}
