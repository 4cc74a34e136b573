//! The part of the streams behaviour that lives on each connection.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use libp2p::StreamProtocol;
use libp2p::core::upgrade::{InboundUpgrade, ReadyUpgrade, UpgradeInfo};
use libp2p::swarm::handler::{
    ConnectionEvent, DialUpgradeError, FullyNegotiatedInbound, FullyNegotiatedOutbound,
};
use libp2p::swarm::{ConnectionHandler, ConnectionHandlerEvent, StreamUpgradeError, SubstreamProtocol};
use tokio::sync::{mpsc, oneshot};

use super::super::connection::{Connection, OpenError, OpenRequest};
use super::super::shared::{Acceptor, Acceptors, Shared};
use super::super::stream::Stream;
use super::super::{guess, link_probe, punch, rpc_server};

type Reply = oneshot::Sender<Result<libp2p::Stream, OpenError>>;

/// Opens the streams that tasks ask for and starts a task for each incoming one.
pub(crate) struct Handler {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    requests: mpsc::Receiver<Box<OpenRequest>>,
}

impl Handler {
    pub(super) fn new(
        shared: Arc<Shared>,
        connection: Arc<Connection>,
        requests: mpsc::Receiver<Box<OpenRequest>>,
    ) -> Self {
        Self { shared, connection, requests }
    }

    fn handle_incoming(&self, protocol: &StreamProtocol, stream: libp2p::Stream) {
        let acceptors = self.shared.acceptors();
        let Some(acceptor) = acceptors.get(protocol) else { return };
        let (shared, connection) = (Arc::clone(&self.shared), Arc::clone(&self.connection));
        let Some(place) = connection.admit_incoming() else {
            tracing::warn!(peer = %connection.peer.short(), %protocol, "stream reset: the peer has too many open");
            return;
        };
        match acceptor {
            Acceptor::Rpc => {
                shared.network.clone().spawn(rpc_server::serve(shared, connection, stream, place));
            }
            Acceptor::Punch => {
                shared.network.clone().spawn(punch::answer(shared, connection, stream, place));
            }
            Acceptor::Guess(way) => {
                shared.network.clone().spawn(guess::answer(shared, connection, *way, stream, place));
            }
            Acceptor::Link => {
                shared.network.clone().spawn(link_probe::answer(shared, connection, stream, place));
            }
            Acceptor::Application(handler) => {
                let handler = Arc::clone(handler);
                shared.application.clone().spawn(async move {
                    let running = tokio::select! {
                        running = Arc::clone(&connection.running).acquire_owned() => running,
                        () = connection.closed.cancelled() => return,
                    };
                    let Ok(_running) = running else { return };
                    let peer = connection.peer.clone();
                    handler(peer, Stream::new(shared, connection, stream)).await;
                    drop(place);
                });
            }
        }
    }
}

impl ConnectionHandler for Handler {
    type FromBehaviour = Infallible;
    type ToBehaviour = Infallible;
    type InboundProtocol = Accept;
    type OutboundProtocol = ReadyUpgrade<StreamProtocol>;
    type InboundOpenInfo = ();
    type OutboundOpenInfo = Reply;

    fn listen_protocol(&self) -> SubstreamProtocol<Accept> {
        SubstreamProtocol::new(Accept(self.shared.acceptors()), ())
    }

    /// Peers stay connected; only a connection beside a better one may close when nothing uses it, and only the end that
    /// dialled it lets it go: two ends that disagree for a moment would otherwise close everything between them.
    fn connection_keep_alive(&self) -> bool {
        !(self.connection.dialled && self.connection.is_redundant())
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ConnectionHandlerEvent<ReadyUpgrade<StreamProtocol>, Reply, Infallible>> {
        match self.requests.poll_recv(cx) {
            Poll::Ready(Some(request)) => {
                let OpenRequest { protocol, reply } = *request;
                Poll::Ready(ConnectionHandlerEvent::OutboundSubstreamRequest {
                    protocol: SubstreamProtocol::new(ReadyUpgrade::new(protocol), reply),
                })
            }
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    fn on_behaviour_event(&mut self, event: Infallible) {
        match event {}
    }

    fn on_connection_event(
        &mut self,
        event: ConnectionEvent<'_, Accept, ReadyUpgrade<StreamProtocol>, (), Reply>,
    ) {
        match event {
            ConnectionEvent::FullyNegotiatedInbound(FullyNegotiatedInbound {
                protocol: (protocol, stream),
                ..
            }) => self.handle_incoming(&protocol, stream),
            ConnectionEvent::FullyNegotiatedOutbound(FullyNegotiatedOutbound {
                protocol: stream,
                info: reply,
            }) => {
                // The asker may have given up; the stream is then closed by dropping it.
                let _ = reply.send(Ok(stream));
            }
            ConnectionEvent::DialUpgradeError(DialUpgradeError { info: reply, error }) => {
                let _ = reply.send(Err(match error {
                    StreamUpgradeError::Timeout => OpenError::Timeout,
                    StreamUpgradeError::NegotiationFailed => OpenError::Unsupported,
                    StreamUpgradeError::Io(error) => OpenError::Io(error),
                    StreamUpgradeError::Apply(never) => match never {},
                }));
            }
            _ => {}
        }
    }
}

/// Accepts whatever this node has a handler for.
#[derive(Clone)]
pub(crate) struct Accept(Arc<Acceptors>);

impl UpgradeInfo for Accept {
    type Info = StreamProtocol;
    type InfoIter = Protocols;

    fn protocol_info(&self) -> Protocols {
        Protocols { acceptors: Arc::clone(&self.0), next: 0 }
    }
}

/// The names of what is accepted. The swarm asks for them after each turn of each connection, so they are not copied as a
/// whole.
pub(crate) struct Protocols {
    acceptors: Arc<Acceptors>,
    next: usize,
}

impl Iterator for Protocols {
    type Item = StreamProtocol;

    fn next(&mut self) -> Option<StreamProtocol> {
        let protocol = self.acceptors.protocols.get(self.next)?.clone();
        self.next += 1;
        Some(protocol)
    }
}

impl InboundUpgrade<libp2p::Stream> for Accept {
    type Output = (StreamProtocol, libp2p::Stream);
    type Error = Infallible;
    type Future = Ready<Result<Self::Output, Infallible>>;

    fn upgrade_inbound(self, stream: libp2p::Stream, protocol: StreamProtocol) -> Self::Future {
        ready(Ok((protocol, stream)))
    }
}
