//! What the stand-in saw: requests, queue messages, violations of the contract, and secrets.
//!
//! Before it: every other file of the stand-in reports here. After it: tests read it.
//! Thread: any. Allocates: per entry, up to the bounds below.
//! Invariant: bounded; the oldest entries go first, and the totals go on counting.
//! Not here: what failed to ingest ([`super::engine`]).

use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::http::HeaderMap;

use super::fault::Target;

/// Requests kept.
const REQUEST_COUNT_MAX: usize = 20_000;
/// Violations kept.
const VIOLATION_COUNT_MAX: usize = 1_000;
/// Queue messages kept.
const MESSAGE_COUNT_MAX: usize = 1_000;
/// Secrets kept.
const SECRET_COUNT_MAX: usize = 100_000;

/// The headers that are worth keeping; `Authorization` is not, but its token is among the secrets.
const HEADERS: &[&str] = &[
    "content-type",
    "content-length",
    "content-encoding",
    "if-none-match",
    "metadata",
    "accept",
    "user-agent",
    "x-ms-version",
    "x-ms-blob-type",
    "x-ms-client-request-id",
    "x-ms-client-version",
    "x-ms-app",
    "x-ms-user",
];

/// One request, as it came.
#[derive(Debug, Clone)]
pub struct SeenRequest {
    /// 0 for the first one, without gaps.
    pub sequence: u64,
    pub target: Target,
    /// The storage account it went to.
    pub account: Option<usize>,
    pub method: String,
    pub path: String,
    /// Holds secrets where the request did.
    pub query: String,
    /// Name in lower case, value; a selection.
    pub headers: Vec<(String, String)>,
    /// 0 until it is answered, and for ever where a fault left it without an answer.
    pub status: u16,
}

#[derive(Debug, Default)]
pub(super) struct Journal {
    requests: Mutex<VecDeque<SeenRequest>>,
    request_count: AtomicU64,
    violations: Mutex<VecDeque<String>>,
    violation_count: AtomicU64,
    messages: Mutex<VecDeque<String>>,
    message_count: AtomicU64,
    secrets: Mutex<BTreeSet<String>>,
}

fn push<T>(entries: &Mutex<VecDeque<T>>, count_max: usize, entry: T) {
    let mut entries = entries.lock().unwrap();
    if entries.len() == count_max {
        entries.pop_front();
    }
    entries.push_back(entry);
}

fn copy<T: Clone>(entries: &Mutex<VecDeque<T>>) -> Vec<T> {
    entries.lock().unwrap().iter().cloned().collect()
}

impl Journal {
    /// Notes a request before anything is done about it; gives its sequence number.
    pub fn request(
        &self,
        target: Target,
        account: Option<usize>,
        method: &str,
        uri: &axum::http::Uri,
        headers: &HeaderMap,
    ) -> u64 {
        let headers = HEADERS
            .iter()
            .filter_map(|name| Some((*name, headers.get(*name)?)))
            .map(|(name, value)| {
                (
                    name.into(),
                    String::from_utf8_lossy(value.as_bytes()).into(),
                )
            })
            .collect();
        let mut requests = self.requests.lock().unwrap();
        let sequence = self.request_count.fetch_add(1, Ordering::Relaxed);
        if requests.len() == REQUEST_COUNT_MAX {
            requests.pop_front();
        }
        requests.push_back(SeenRequest {
            sequence,
            target,
            account,
            method: method.into(),
            path: uri.path().into(),
            query: uri.query().unwrap_or_default().into(),
            headers,
            status: 0,
        });
        sequence
    }

    /// Notes how a request was answered.
    pub fn answered(&self, sequence: u64, status: u16) {
        let mut requests = self.requests.lock().unwrap();
        let first = requests.front().map_or(0, |request| request.sequence);
        let index = sequence.checked_sub(first).map(|index| index as usize);
        if let Some(request) = index.and_then(|index| requests.get_mut(index)) {
            request.status = status;
        }
    }

    /// Notes that a client did what the contract forbids, or what the real service would only tolerate.
    pub fn violation(&self, text: impl Into<String>) {
        let text = text.into();
        tracing::warn!(%text, "the stand-in saw a violation");
        self.violation_count.fetch_add(1, Ordering::Relaxed);
        push(&self.violations, VIOLATION_COUNT_MAX, text);
    }

    /// Notes the JSON of a queue message.
    pub fn message(&self, json: &str) {
        self.message_count.fetch_add(1, Ordering::Relaxed);
        push(&self.messages, MESSAGE_COUNT_MAX, json.into());
    }

    /// Notes a text that no log may ever hold.
    pub fn secret(&self, secret: impl Into<String>) {
        let mut secrets = self.secrets.lock().unwrap();
        if secrets.len() == SECRET_COUNT_MAX {
            secrets.pop_first();
        }
        secrets.insert(secret.into());
    }

    pub fn requests(&self) -> Vec<SeenRequest> {
        copy(&self.requests)
    }

    pub fn request_count(&self) -> u64 {
        self.request_count.load(Ordering::Relaxed)
    }

    pub fn violations(&self) -> Vec<String> {
        copy(&self.violations)
    }

    pub fn violation_count(&self) -> u64 {
        self.violation_count.load(Ordering::Relaxed)
    }

    pub fn messages(&self) -> Vec<String> {
        copy(&self.messages)
    }

    pub fn message_count(&self) -> u64 {
        self.message_count.load(Ordering::Relaxed)
    }

    pub fn secrets(&self) -> Vec<String> {
        self.secrets.lock().unwrap().iter().cloned().collect()
    }
}
