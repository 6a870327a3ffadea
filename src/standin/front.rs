//! What every request passes: it is named, noted, and struck by a fault if it is its turn.
//!
//! Before it: [`super::listener`] read the head. After it: the router of the port.
//! Thread: the runtime's. Allocates: per request; management bodies are read here, since their command names the target.
//! Invariant: a request is noted before anything is done about it, and its answer before it is sent.
//! Not here: what a proper answer is.

use std::sync::Arc;

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::body::Body as _;
use uuid::Uuid;

use super::fault::{Action, Target};
use super::listener::Wire;
use super::storage::StorageError;
use super::{Service, identity, mgmt};

/// Bytes of a management command.
const COMMAND_SIZE_MAX: usize = 1 << 20;

/// Which port a request came to.
#[derive(Clone, Copy)]
pub(super) enum Port {
    Control,
    Blob(usize),
    Queue(usize),
}

#[derive(Clone)]
pub(super) struct Front {
    pub service: Arc<Service>,
    pub port: Port,
}

impl Port {
    fn account(self) -> Option<usize> {
        match self {
            Port::Control => None,
            Port::Blob(account) | Port::Queue(account) => Some(account),
        }
    }

    /// What a request is for; management commands are told apart by their body.
    fn target(self, method: &Method, uri: &Uri) -> Target {
        let query = uri.query().unwrap_or_default();
        let has = |pair: &str| query.split('&').any(|other| other == pair);
        match self {
            Port::Blob(_) if method != Method::PUT => Target::BlobGet,
            Port::Blob(_) if has("comp=block") => Target::BlockPut,
            Port::Blob(_) if has("comp=blocklist") => Target::BlockListPut,
            Port::Blob(_) => Target::BlobPut,
            Port::Queue(_) if method == Method::POST => Target::QueuePost,
            Port::Queue(_) => Target::QueueGet,
            Port::Control => match uri.path() {
                path if path.ends_with("/oauth2/v2.0/token") => Target::Token,
                "/metadata/identity/oauth2/token" => Target::Imds,
                "/v1/rest/auth/metadata" => Target::Metadata,
                "/v1/rest/mgmt" => Target::Management,
                _ => Target::Page,
            },
        }
    }
}

/// The middleware of all ports.
pub(super) async fn pass(
    State(front): State<Front>,
    Extension(wire): Extension<Arc<Wire>>,
    request: Request,
    next: Next,
) -> Response {
    let service = &front.service;
    let account = front.port.account();
    let (parts, mut body) = request.into_parts();
    let mut target = front.port.target(&parts.method, &parts.uri);
    if target == Target::Management {
        let Ok(bytes) = to_bytes(body, COMMAND_SIZE_MAX).await else {
            return StatusCode::PAYLOAD_TOO_LARGE.into_response();
        };
        target = mgmt::target(&bytes);
        body = Body::from(bytes);
    }
    let method = parts.method.as_str();
    let journal = &service.journal;
    let sequence = journal.request(target, account, method, &parts.uri, &parts.headers);
    service.progress.changed();
    let client_request_id = parts.headers.get("x-ms-client-request-id").cloned();
    let size = parts.headers.get(header::CONTENT_LENGTH);
    let size = size.and_then(|size| size.to_str().ok()?.parse().ok());
    let size: u64 = size.unwrap_or(body.size_hint().lower());
    let mut response = match service.script.take(target, account) {
        None => next.run(Request::from_parts(parts, body)).await,
        Some(Action::Delay(pause)) => {
            tokio::time::sleep(pause).await;
            next.run(Request::from_parts(parts, body)).await
        }
        Some(Action::Status {
            code,
            error_code,
            retry_after,
        }) => {
            read(body, u64::MAX).await;
            refusal(target, code, error_code, retry_after)
        }
        Some(Action::TimeoutBeforeAccept) => {
            read(body, u64::MAX).await;
            return std::future::pending().await;
        }
        Some(Action::TimeoutAfterAccept) => {
            next.run(Request::from_parts(parts, body)).await;
            service.progress.changed();
            return std::future::pending().await;
        }
        Some(Action::ResetMidBody) => {
            read(body, size / 2).await;
            wire.reset();
            return std::future::pending().await;
        }
        Some(Action::ResetAfterAccept) => {
            next.run(Request::from_parts(parts, body)).await;
            service.progress.changed();
            wire.reset();
            return std::future::pending().await;
        }
    };
    identify(response.headers_mut(), client_request_id);
    journal.answered(sequence, response.status().as_u16());
    service.progress.changed();
    response
}

/// Reads at least `size` bytes of a body, or all there are.
async fn read(body: Body, size: u64) {
    let mut body = std::pin::pin!(body);
    let mut count = 0;
    while count < size {
        let frame = std::future::poll_fn(|context| body.as_mut().poll_frame(context)).await;
        // Its end, or the end of its connection.
        let Some(Ok(frame)) = frame else { return };
        count += frame.data_ref().map_or(0, Bytes::len) as u64;
    }
}

/// An error answer in the format of the service that the target belongs to.
fn refusal(
    target: Target,
    code: u16,
    error_code: &'static str,
    retry_after: Option<u32>,
) -> Response {
    let mut response = match target {
        Target::Token | Target::Imds => identity::refusal(code, error_code, "a scripted fault"),
        Target::Metadata
        | Target::Resources
        | Target::IdentityToken
        | Target::Management
        | Target::Page => {
            let permanent = code < 500 && code != 429;
            mgmt::refusal(
                code,
                error_code,
                "Kusto.Standin.ScriptedFault",
                "a scripted fault",
                permanent,
            )
        }
        Target::BlobPut
        | Target::BlockPut
        | Target::BlockListPut
        | Target::BlobGet
        | Target::QueuePost
        | Target::QueueGet => {
            StorageError::new(code, error_code, "a scripted fault").into_response()
        }
    };
    if let Some(seconds) = retry_after {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

/// The ids that Azure puts on every answer.
fn identify(headers: &mut HeaderMap, client_request_id: Option<HeaderValue>) {
    let id = Uuid::new_v4().to_string();
    for name in ["x-ms-request-id", "x-ms-activity-id"] {
        let value = HeaderValue::from_str(&id).expect("a UUID is ASCII");
        headers.insert(name, value);
    }
    headers.insert(
        "x-ms-version",
        HeaderValue::from_static(super::sas::VERSION),
    );
    if let Some(id) = client_request_id {
        headers.insert("x-ms-client-request-id", id);
    }
}
