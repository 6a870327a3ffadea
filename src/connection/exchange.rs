//! One request and its answer, whatever the version of HTTP: who may send, what becomes of the body, when it is said.
//!
//! Before it: a front ([`super`] for HTTP/1.1) has a head, and then the whole request in a slab.
//! After it: the rows are in an upload buffer, and the promise of the route is kept; the front writes the answer.
//! Thread: one reactor. Allocates: never, but for [`Shown`].
//! Invariant: every request that comes here is counted once, with what became of it.
//! Not here: receiving, and the form of the answers ([`crate::http::reply`]).

use std::cell::Cell;
use std::net::IpAddr;
use std::time::Instant;

use rustls::pki_types::CertificateDer;

use crate::ack::Ticket;
use crate::admission::{self, Admitted, Certificate};
use crate::config::{Ack, Route};
use crate::encoder::{Encoded, NotEncoded, Request};
use crate::error::{Refusal, Reject};
use crate::http::h1::{Expectation, Framing, Head, Method};
use crate::live::Live;
use crate::reactor::Core;

/// Why a request ended without being accepted.
pub enum Unserved {
    Rejected(Reject),
    Refused(Refusal),
    /// The peer went away within a request.
    Gone,
    /// The connection ended, and there was no request.
    End,
}

impl From<Refusal> for Unserved {
    fn from(refusal: Refusal) -> Self {
        Unserved::Refused(refusal)
    }
}

impl From<Reject> for Unserved {
    fn from(reject: Reject) -> Self {
        Unserved::Rejected(reject)
    }
}

/// Whose a request is, as far as its connection says.
#[derive(Clone, Copy)]
pub struct Peer<'a> {
    /// In the order of the configuration.
    pub listener_index: usize,
    pub address: IpAddr,
    pub shown: &'a Shown,
}

/// The certificate that a peer has shown in the handshake, if it has.
#[derive(Default)]
pub struct Shown(Option<Box<ShownCertificate>>);

struct ShownCertificate {
    certificate: CertificateDer<'static>,
    /// Whose it is, and in which generation of settings: principals come and go with reloads.
    known: Cell<Option<(u64, Certificate)>>,
}

impl Shown {
    pub fn new(certificate: Option<&CertificateDer<'static>>) -> Self {
        let shown = certificate.map(|certificate| ShownCertificate {
            certificate: certificate.clone(),
            known: Cell::new(None),
        });
        Shown(shown.map(Box::new))
    }

    /// Whose it is by these settings. Allocates where they are new to it, and only where there is a certificate.
    pub fn whose(&self, live: &Live) -> Certificate {
        let Some(shown) = &self.0 else {
            return Certificate::None;
        };
        match shown.known.get() {
            Some((generation, certificate)) if generation == live.generation => certificate,
            _ => {
                let certificate = live.admission.certificate(&shown.certificate);
                shown.known.set(Some((live.generation, certificate)));
                certificate
            }
        }
    }
}

/// A request whose rows are encoded, and which is answered when its promise is kept.
#[derive(Clone, Copy)]
pub struct Promise {
    pub ticket: Ticket,
    pub record_count: u64,
    pub row_bytes: u64,
}

/// Decides from the head alone whether the body is wanted; its route. No request is larger than `request_size_max`.
pub fn admit<'a>(
    live: &'a Live,
    peer: &Peer<'_>,
    head_bytes: &[u8],
    head: &Head,
    request_size_max: usize,
) -> Result<(&'a Route, Admitted), Reject> {
    match head.method {
        Method::Store => {}
        Method::Unknown => return Err(Reject::MethodUnknown),
        method => {
            let head = method == Method::Head;
            return Err(Reject::Method { head });
        }
    }
    let found = live.routes.find(&head_bytes[head.path.clone()]);
    let admitted = live.admission.admit(&admission::Request {
        listener_index: peer.listener_index,
        route_index: found.map(|(index, _)| index),
        peer: peer.address,
        certificate: peer.shown.whose(live),
        head: head_bytes,
        size: match head.framing {
            Framing::Length(length) => Some(length),
            Framing::Chunked => None,
        },
    })?;
    let (Some((_, route)), Some(admitted)) = (found, admitted) else {
        return Err(Reject::Route);
    };
    if head.expectation == Expectation::Unknown {
        return Err(Reject::Expectation);
    }
    if head.content_encoded {
        return Err(Reject::ContentCoding);
    }
    if !head.json {
        return Err(Reject::ContentType);
    }
    if let Framing::Length(length) = head.framing
        && length > request_size_max as u64 - head.size as u64
    {
        return Err(Reject::BodySize);
    }
    Ok((route, admitted))
}

/// Encodes a request that is there in full, head and decoded body; what its answer waits for.
pub async fn store(
    core: &Core,
    live: &Live,
    route: &Route,
    admitted: &Admitted,
    head: &Head,
    request: &mut [u8],
) -> Result<Promise, Unserved> {
    if core.floor_receive {
        return Ok(promise(
            route,
            Ack::Memory,
            &Encoded {
                record_count: 0,
                row_bytes: 0,
                position: 0,
            },
        ));
    }
    let (head_bytes, body) = request.split_at_mut(head.size);
    live.admission.admit_body(admitted, head_bytes, body)?;
    let request = Request {
        route,
        path: &head_bytes[head.path.clone()],
        body,
        timestamp: core.clock.timestamp(),
    };
    let encoded = core
        .encoder
        .encode(&core.upload_buffers, request, core.wait_deadline())
        .await;
    match encoded {
        Ok(encoded) => Ok(promise(route, route.ack, &encoded)),
        Err(NotEncoded::Rejected(reject)) => Err(reject.into()),
        Err(NotEncoded::Refused { refusal, row_count }) => {
            core.count_unacknowledged(row_count);
            Err(refusal.into())
        }
    }
}

fn promise(route: &Route, ack: Ack, encoded: &Encoded) -> Promise {
    Promise {
        ticket: Ticket {
            table_index: route.table_index,
            position: encoded.position,
            ack,
        },
        record_count: encoded.record_count,
        row_bytes: encoded.row_bytes,
    }
}

/// Waits until the promise is kept, or cannot be, and counts the request.
pub async fn settle(core: &Core, promise: &Promise) -> Result<(), Refusal> {
    let ticket = promise.ticket;
    let deadline =
        (ticket.ack == Ack::Delivered).then(|| Instant::now() + core.live().config.limits.ack);
    let kept = core.upload_buffers.acks().settled(ticket, deadline).await;
    match kept {
        Ok(()) => core.count_accepted(promise.record_count, promise.row_bytes),
        Err(refusal) => {
            core.count_unacknowledged(promise.record_count);
            core.count_refused(refusal);
        }
    }
    kept
}
