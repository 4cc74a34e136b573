//! Rendezvous, both ends: a point that writes peers down under the name of their network and tells those who ask for it, and a
//! node that registers at points and connects to whom it finds there. Its messages are those of the libp2p network; libp2p's own
//! part for it keeps whatever it is given for as long as it is told, so it is not used.
//!
//! Whoever gets as far as a stream has been let in (`service/gate`), so a private swarm's point serves its members alone.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use libp2p::StreamProtocol;
use libp2p::core::{Multiaddr, PeerRecord, multiaddr::Protocol};
use libp2p::identity::Keypair;
use swarm_wire::{DecodeError, PeerId};
use tokio::io::BufReader;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::connection::{Connection, OpenError};
use super::driver::Command;
use super::news::{own_addresses, unix_now};
use super::shared::{Acceptor, BoxFuture, Shared, lock};
use super::stream::{Stream, read_frame, send_last_frame};
use super::wire_peer;
use crate::addr::is_plausible;
use crate::error::{DialError, FrameError};
use crate::news::record::{self, Record};
use crate::rendezvous::wire::{ANSWER_FRAME_MAX_BYTES, Answer, QUESTION_MAX_BYTES, Question};
use crate::rendezvous::{ANSWER_MAX, Book, Refusal, TTL_DEFAULT_S};

/// The protocol of rendezvous points.
pub(super) const RENDEZVOUS_PROTOCOL: StreamProtocol = StreamProtocol::new("/rendezvous/1.0.0");
/// A question and its answer take no longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A node that has enough peers asks a point this often; one that has too few asks every `news_interval`.
const ASK_EVERY: Duration = Duration::from_secs(60);
/// A registration is renewed when a quarter of its time is over.
const RENEWED: Duration = Duration::from_secs(TTL_DEFAULT_S / 4);

/// Why nothing came of a visit at a point.
#[derive(Debug, thiserror::Error)]
enum VisitError {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("it is no rendezvous point")]
    Unsupported,
    #[error("the connection was lost, or no stream opened in time")]
    Lost,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("it refused: {0}")]
    Refused(#[from] Refusal),
    #[error("it gave no answer, or one to something else")]
    NoAnswer,
    #[error("own addresses could not be signed: {reason}")]
    Unsigned { reason: String },
    #[error("no answer within {PATIENCE:?}")]
    Timeout,
}

impl From<OpenError> for VisitError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Unsupported => Self::Unsupported,
            OpenError::Lost | OpenError::Timeout => Self::Lost,
            OpenError::Io(error) => Self::Frame(error.into()),
        }
    }
}

/// Serves, where the node is a point, and visits the points that it was given, until the node stops.
pub(super) fn start(shared: &Arc<Shared>, keypair: &Keypair) {
    if shared.config.rendezvous_point {
        serve(shared);
    }
    for address in &shared.config.rendezvous {
        let Ok(address) = address.parse::<Multiaddr>() else { continue };
        let Some(Protocol::P2p(peer)) = address.iter().last() else { continue };
        let Ok(peer) = wire_peer(&peer) else { continue };
        let visitor = Visitor {
            keypair: keypair.clone(),
            namespace: format!("/lattica/{}", shared.config.network),
            peer,
            address,
            registered: None,
            cookie: None,
        };
        shared.network.spawn(run(Arc::clone(shared), visitor));
    }
}

fn serve(shared: &Arc<Shared>) {
    let after = u64::try_from(unix_now().as_millis()).unwrap_or_default();
    let book = Arc::new(Mutex::new(Book::new(after)));
    let weak = Arc::downgrade(shared);
    let answer_stream = move |peer: PeerId, stream: Stream| -> BoxFuture<()> {
        let (shared, book) = (Weak::clone(&weak), Arc::clone(&book));
        Box::pin(async move {
            let Some(shared) = shared.upgrade() else { return };
            let asker = stream.asker();
            // One question of a peer at a time.
            let Ok(_turn) = asker.meeting().acquire().await else { return };
            if let Ok(Err(error)) = timeout(PATIENCE, answer(&shared, &book, &peer, stream)).await {
                tracing::debug!(peer = %peer.short(), %error, "rendezvous: not answered");
            }
        })
    };
    shared.set_acceptor(RENDEZVOUS_PROTOCOL, Some(Acceptor::Application(Arc::new(answer_stream))));
}

async fn answer(
    shared: &Shared,
    book: &Mutex<Book>,
    peer: &PeerId,
    stream: Stream,
) -> Result<(), FrameError> {
    let mut stream = BufReader::new(stream);
    let Some(question) =
        read_frame(&mut stream, "question to a rendezvous point", QUESTION_MAX_BYTES).await?
    else {
        return Ok(());
    };
    let now = shared.now();
    let answer = match Question::decode(question)? {
        Question::Register { namespace, record, ttl_s } => {
            let registered = match record::decode_of_any_form(&record) {
                Ok(signed) if signed.author == *peer => {
                    // Copied: what is kept must not hold on to the whole question that it came in.
                    let record = Bytes::copy_from_slice(&record);
                    lock(book).register(now, peer, &namespace, record, ttl_s)
                }
                Ok(_) => Err(Refusal::NotAuthorized),
                Err(_) => Err(Refusal::InvalidRecord),
            };
            if let Err(refusal) = registered {
                tracing::info!(peer = %peer.short(), %refusal, "rendezvous: not registered");
            }
            Answer::Registered(registered)
        }
        Question::Unregister { namespace } => {
            lock(book).unregister(peer, &namespace);
            return Ok(());
        }
        Question::Discover { namespace, limit, cookie } => {
            Answer::Discovered(lock(book).discover(now, namespace.as_deref(), limit, cookie.as_deref()))
        }
    };
    send_last_frame(&mut stream, &answer.encode()).await?;
    Ok(())
}

/// What a node has to do with one point.
struct Visitor {
    keypair: Keypair,
    namespace: String,
    peer: PeerId,
    address: Multiaddr,
    /// The connection over which this node registered (another one may lead to a point that was started anew), its addresses
    /// then, and when.
    registered: Option<(u64, Vec<Multiaddr>, Duration)>,
    cookie: Option<Bytes>,
}

async fn run(shared: Arc<Shared>, mut visitor: Visitor) {
    let mut tick = interval(shared.config.news_interval);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut next_at, mut pause) = (Duration::ZERO, shared.config.news_interval);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = shared.stopped.cancelled() => return,
        }
        let (now, point) = (shared.now(), visitor.peer.short().to_string());
        if now < next_at {
            continue;
        }
        let visited = tokio::select! {
            visited = visitor.visit(&shared) => visited,
            () = shared.stopped.cancelled() => return,
        };
        match visited {
            Ok(()) => {
                pause = shared.config.news_interval;
                let few = shared.table().connected_peers().len() < shared.config.keep_peers;
                next_at = if few { now } else { now + ASK_EVERY };
            }
            Err(error) => {
                tracing::warn!(point, %error, "rendezvous: tried again in {pause:?}");
                (visitor.registered, visitor.cookie) = (None, None);
                next_at = now + pause;
                pause = (pause * 2).min(ASK_EVERY);
            }
        }
    }
}

impl Visitor {
    /// Registers, where that is due, and asks who else is there.
    async fn visit(&mut self, shared: &Arc<Shared>) -> Result<(), VisitError> {
        let connection = self.connection(shared).await?;
        let (now, addresses) = (shared.now(), own_addresses(shared).await);
        let current = self.registered.as_ref().is_some_and(|(key, said, at)| {
            *key == connection.key && *said == addresses && now < *at + RENEWED
        });
        if !current && !addresses.is_empty() {
            // In the form that libp2p's own points read.
            let record = PeerRecord::new(&self.keypair, addresses.clone())
                .map_err(|error| VisitError::Unsigned { reason: error.to_string() })?;
            let record = record.into_signed_envelope().into_protobuf_encoding().into();
            let question =
                Question::Register { namespace: self.namespace.clone(), record, ttl_s: Some(TTL_DEFAULT_S) };
            match ask(shared, &connection, &question).await? {
                Answer::Registered(result) => drop(result?),
                Answer::Discovered(_) => return Err(VisitError::NoAnswer),
            }
            self.registered = Some((connection.key, addresses, now));
        }
        let question = Question::Discover {
            namespace: Some(self.namespace.clone()),
            limit: Some(ANSWER_MAX as u64),
            cookie: self.cookie.clone(),
        };
        let found = match ask(shared, &connection, &question).await? {
            Answer::Discovered(found) => found?,
            Answer::Registered(_) => return Err(VisitError::NoAnswer),
        };
        self.cookie = Some(found.cookie).filter(|cookie| !cookie.is_empty());
        for registration in found.registrations.iter().filter(|found| found.namespace == self.namespace) {
            // One that cannot be read does not hide the others.
            let Ok(Record { author, addresses, .. }) = record::decode_of_any_form(&registration.record)
            else {
                continue;
            };
            if author == shared.local {
                continue;
            }
            let limit = shared.config.limits.addresses_per_peer;
            for address in addresses.iter().filter(|a| is_plausible(a, &connection.address)).take(limit) {
                shared.table().handle_address(now, &author, address);
            }
            let counts_s = registration.ttl_s.min(TTL_DEFAULT_S);
            shared.news.lock().meet(author, now + Duration::from_secs(counts_s));
        }
        Ok(())
    }

    async fn connection(&self, shared: &Shared) -> Result<Arc<Connection>, VisitError> {
        if let Some(connection) = shared.table().best(&self.peer) {
            return Ok(connection);
        }
        let (reply, answer) = oneshot::channel();
        shared.command(Command::Dial { address: self.address.clone(), reply }).await?;
        answer.await.unwrap_or(Err(DialError::ShutDown))?;
        shared.table().best(&self.peer).ok_or(VisitError::Lost)
    }
}

/// Asks on a stream of its own.
async fn ask(
    shared: &Arc<Shared>,
    connection: &Arc<Connection>,
    question: &Question,
) -> Result<Answer, VisitError> {
    let asking = async {
        let stream = connection.open(RENDEZVOUS_PROTOCOL).await?;
        let mut stream = BufReader::new(Stream::new(Arc::clone(shared), Arc::clone(connection), stream));
        send_last_frame(&mut stream, &question.encode()).await.map_err(FrameError::from)?;
        let answer = read_frame(&mut stream, "rendezvous point's answer", ANSWER_FRAME_MAX_BYTES).await?;
        Ok(Answer::decode(answer.ok_or(VisitError::NoAnswer)?)?)
    };
    timeout(PATIENCE, asking).await.unwrap_or(Err(VisitError::Timeout))
}
