//! Queues: Put, Get, Peek and Delete Message.
//!
//! Before it: [`super::Place`] has admitted the request. After it: [`crate::standin::engine`] takes the message.
//! Thread: the runtime's. Allocates: the messages, up to a bound beyond which it answers `ServerBusy`.
//! Invariant: a message is given to one reader at a time, until its visibility timeout has passed.
//! Not here: what a message says ([`crate::standin::message`]).
//!
//! Source: Azure Storage REST, "Put Message", "Get Messages", "Peek Messages", "Delete Message".

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, post};
use jiff::Timestamp;
use serde::Deserialize;
use uuid::Uuid;

use super::{FAILED_QUEUE, Place, Query, SUCCEEDED_QUEUE, StorageError};
use crate::standin::clock::{http_text, later};
use crate::standin::sas::StorageService;

/// Bytes of a message's text, as posted.
const MESSAGE_SIZE_MAX: usize = 64 << 10;
/// Bytes of a request to post one: the text, and room for the XML around it and for escapes.
const REQUEST_SIZE_MAX: usize = 6 * MESSAGE_SIZE_MAX;
/// Messages in all queues.
const MESSAGE_COUNT_MAX: usize = 1_000_000;
/// Reports kept in each of the two report queues, since nobody has to read them.
const REPORT_COUNT_MAX: usize = 1_000;
const TTL_DEFAULT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Get Messages gives at most this many.
const GET_COUNT_MAX: usize = 32;

#[derive(Debug, Clone)]
struct Message {
    id: Uuid,
    text: String,
    inserted: Timestamp,
    expires: Timestamp,
    visible: Timestamp,
    receipt: Uuid,
    dequeue_count: u32,
}

/// All queues of all accounts, by account and name; one that nothing was posted to has no entry.
#[derive(Default)]
pub(in crate::standin) struct Queues {
    queues: Mutex<BTreeMap<(usize, String), VecDeque<Message>>>,
}

#[derive(Deserialize)]
#[serde(rename = "QueueMessage", deny_unknown_fields)]
struct Posted {
    #[serde(rename = "MessageText")]
    text: String,
}

fn is_report(queue: &str) -> bool {
    queue == SUCCEEDED_QUEUE || queue == FAILED_QUEUE
}

impl Queues {
    /// Takes the oldest visible ingestion message, for good.
    pub fn take(&self, now: Timestamp) -> Option<String> {
        let mut queues = self.queues.lock().unwrap();
        for ((_, name), queue) in queues.iter_mut() {
            queue.retain(|message| message.expires > now);
            let visible = queue.iter().position(|message| message.visible <= now);
            if let Some(index) = visible.filter(|_| !is_report(name)) {
                return queue.remove(index).map(|message| message.text);
            }
        }
        None
    }

    /// Ingestion messages that wait, visible or not.
    pub fn message_count(&self) -> usize {
        let queues = self.queues.lock().unwrap();
        let ingestion = queues.iter().filter(|((_, name), _)| !is_report(name));
        ingestion.map(|(_, queue)| queue.len()).sum()
    }

    /// Puts a report into one of account 0's report queues; the oldest goes where there are too many.
    pub fn report(&self, queue: &str, text: String, now: Timestamp) {
        let mut queues = self.queues.lock().unwrap();
        let queue = queues.entry((0, queue.into())).or_default();
        if queue.len() == REPORT_COUNT_MAX {
            queue.pop_front();
        }
        queue.push_back(Message::new(text, now, later(now, TTL_DEFAULT), now));
    }

    fn post(&self, key: (usize, String), message: Message) -> Result<(), StorageError> {
        let mut queues = self.queues.lock().unwrap();
        if queues.values().map(VecDeque::len).sum::<usize>() >= MESSAGE_COUNT_MAX {
            let message = "The server is busy: the stand-in holds as many messages as it may.";
            return Err(StorageError::new(503, "ServerBusy", message));
        }
        queues.entry(key).or_default().push_back(message);
        Ok(())
    }

    fn get(
        &self,
        key: (usize, String),
        count: usize,
        hide: Option<Duration>,
        now: Timestamp,
    ) -> Vec<Message> {
        let mut queues = self.queues.lock().unwrap();
        let Some(queue) = queues.get_mut(&key) else {
            return Vec::new();
        };
        queue.retain(|message| message.expires > now);
        let visible = queue.iter_mut().filter(|message| message.visible <= now);
        let taken = visible.take(count).map(|message| {
            if let Some(hide) = hide {
                message.visible = later(now, hide);
                message.receipt = Uuid::new_v4();
                message.dequeue_count += 1;
            }
            message.clone()
        });
        taken.collect()
    }

    fn delete(&self, key: (usize, String), id: Uuid, receipt: Uuid) -> Result<(), StorageError> {
        let mut queues = self.queues.lock().unwrap();
        let queue = queues.entry(key).or_default();
        let Some(index) = queue.iter().position(|message| message.id == id) else {
            return Err(StorageError::new(
                404,
                "MessageNotFound",
                "The specified message does not exist.",
            ));
        };
        if queue[index].receipt != receipt {
            let message =
                "The specified pop receipt did not match the pop receipt for a dequeued message.";
            return Err(StorageError::new(400, "PopReceiptMismatch", message));
        }
        queue.remove(index);
        Ok(())
    }
}

impl Message {
    fn new(text: String, inserted: Timestamp, expires: Timestamp, visible: Timestamp) -> Message {
        Message {
            id: Uuid::new_v4(),
            text,
            inserted,
            expires,
            visible,
            receipt: Uuid::new_v4(),
            dequeue_count: 0,
        }
    }

    fn xml(&self, receipt: bool, content: bool) -> String {
        let mut xml = format!(
            "<QueueMessage><MessageId>{}</MessageId><InsertionTime>{}</InsertionTime>\
             <ExpirationTime>{}</ExpirationTime>",
            self.id,
            http_text(self.inserted),
            http_text(self.expires)
        );
        if receipt {
            xml += &format!(
                "<PopReceipt>{}</PopReceipt><TimeNextVisible>{}</TimeNextVisible>",
                self.receipt,
                http_text(self.visible)
            );
        }
        if content {
            xml += &format!(
                "<DequeueCount>{}</DequeueCount><MessageText>{}</MessageText>",
                self.dequeue_count,
                quick_xml::escape::escape(self.text.as_str())
            );
        }
        xml + "</QueueMessage>"
    }
}

fn list(status: StatusCode, messages: impl Iterator<Item = String>) -> Response {
    let messages: String = messages.collect();
    let xml = format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?><QueueMessagesList>{messages}</QueueMessagesList>"
    );
    (status, [(header::CONTENT_TYPE, "application/xml")], xml).into_response()
}

/// What answers on an account's queue port.
pub(in crate::standin) fn router(place: Place) -> Router {
    Router::new()
        .route(
            "/{account}/{queue}/messages",
            post(put_message).get(get_messages),
        )
        .route("/{account}/{queue}/messages/{id}", delete(delete_message))
        .fallback(super::unknown)
        .with_state(place)
}

/// A number of seconds in the query.
fn seconds(query: &Query, name: &str, default: i64) -> Result<i64, StorageError> {
    let value = query.get(name).map_or(Ok(default), str::parse);
    value.map_err(|_| {
        let message = format!("Value for one of the query parameters is invalid: {name}");
        StorageError::new(400, "InvalidQueryParameterValue", message)
    })
}

fn out_of_range(name: &str) -> StorageError {
    let message = format!(
        "One of the query parameters specified in the request URI is outside the permissible range: {name}"
    );
    StorageError::new(400, "OutOfRangeQueryParameterValue", message)
}

async fn put_message(
    State(place): State<Place>,
    Path((account_name, queue)): Path<(String, String)>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, StorageError> {
    let query = Query::of(&uri);
    place.admit(
        &account_name,
        StorageService::Queue,
        &queue,
        "a",
        &query,
        &headers,
    )?;
    let standin = &place.service;
    let now = standin.clock.now();
    let expires = match seconds(&query, "messagettl", TTL_DEFAULT.as_secs() as i64)? {
        -1 => Timestamp::MAX,
        ttl if ttl > 0 => later(now, Duration::from_secs(ttl as u64)),
        _ => return Err(out_of_range("messagettl")),
    };
    let visible = match seconds(&query, "visibilitytimeout", 0)? {
        hidden if (0..=TTL_DEFAULT.as_secs() as i64).contains(&hidden) => {
            later(now, Duration::from_secs(hidden as u64))
        }
        _ => return Err(out_of_range("visibilitytimeout")),
    };
    let too_large = || {
        let message = "The request body is too large and exceeds the maximum permissible limit.";
        StorageError::new(413, "RequestBodyTooLarge", message)
    };
    let bytes = axum::body::to_bytes(body, REQUEST_SIZE_MAX).await;
    let bytes = bytes.map_err(|_| too_large())?;
    let posted = std::str::from_utf8(&bytes)
        .ok()
        .filter(|text| text.contains("<QueueMessage"))
        .and_then(|text| quick_xml::de::from_str::<Posted>(text).ok());
    let Some(posted) = posted else {
        standin
            .journal
            .violation("a queue message is not <QueueMessage><MessageText>…");
        let message = "The specified XML is not syntactically valid.";
        return Err(StorageError::new(400, "InvalidXmlDocument", message));
    };
    if posted.text.len() > MESSAGE_SIZE_MAX {
        return Err(too_large());
    }
    let message = Message::new(posted.text, now, expires, visible);
    let answer = message.xml(true, false);
    standin
        .storage
        .queues
        .post((place.account, queue), message)?;
    standin.engine.wake();
    Ok(list(StatusCode::CREATED, std::iter::once(answer)))
}

async fn get_messages(
    State(place): State<Place>,
    Path((account_name, queue)): Path<(String, String)>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, StorageError> {
    let query = Query::of(&uri);
    let peek = query.get("peekonly") == Some("true");
    let permission = if peek { "r" } else { "p" };
    place.admit(
        &account_name,
        StorageService::Queue,
        &queue,
        permission,
        &query,
        &headers,
    )?;
    let count = seconds(&query, "numofmessages", 1)?;
    if !(1..=GET_COUNT_MAX as i64).contains(&count) {
        return Err(out_of_range("numofmessages"));
    }
    let hide = seconds(&query, "visibilitytimeout", 30)?;
    if !(1..=TTL_DEFAULT.as_secs() as i64).contains(&hide) {
        return Err(out_of_range("visibilitytimeout"));
    }
    let hide = (!peek).then_some(Duration::from_secs(hide as u64));
    let standin = &place.service;
    let now = standin.clock.now();
    let key = (place.account, queue);
    let messages = standin.storage.queues.get(key, count as usize, hide, now);
    Ok(list(
        StatusCode::OK,
        messages.iter().map(|message| message.xml(!peek, true)),
    ))
}

async fn delete_message(
    State(place): State<Place>,
    Path((account_name, queue, id)): Path<(String, String, String)>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<StatusCode, StorageError> {
    let query = Query::of(&uri);
    place.admit(
        &account_name,
        StorageService::Queue,
        &queue,
        "p",
        &query,
        &headers,
    )?;
    let receipt = query.get("popreceipt").unwrap_or_default();
    let receipt = receipt.parse().unwrap_or(Uuid::nil());
    let id = id.parse().unwrap_or(Uuid::nil());
    let queues = &place.service.storage.queues;
    queues.delete((place.account, queue), id, receipt)?;
    Ok(StatusCode::NO_CONTENT)
}
