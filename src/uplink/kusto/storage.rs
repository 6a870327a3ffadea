//! Azure Storage: one blob put, one message posted, and what the answers mean.
//!
//! Before it: `delivery.rs` has chosen a resource.
//! After it: the blob is there, or the message is.
//! Thread: the uplink's runtime. Allocates: per request; the body is the caller's memory or a stream of pieces.
//! Invariant: a request is made once; a blob is created or found, never replaced; no error names a signature.
//! Not here: retries, and which resource is next.
//!
//! Source: the pages "Put Blob", "Put Message" and "Common REST API error codes" of the Azure Storage documentation.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, IF_NONE_MATCH};
use reqwest::{Body, Url};
use zeroize::Zeroizing;

use super::http::{Answer, Http, send};
use super::request_id;
use crate::error::{Remedy, UploadError, UploadStep};
use crate::limits::{QUEUE_POST_TIMEOUT, STORAGE_ANSWER_SIZE_MAX, blob_put_timeout};
use crate::secret::SasUrl;

/// Every account there is knows it, and so do the emulators; from 2019-12-12 on a single put takes 5,000 MiB.
const STORAGE_VERSION: &str = "2021-12-02";

/// How a blob came to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    Created,
    /// An earlier attempt had put it: names are never used for anything else.
    Found,
}

/// Puts a block blob of `size` bytes, unless there is one of this name.
pub async fn put_blob(
    http: &Http,
    blob: &SasUrl,
    body: Body,
    size: u64,
) -> Result<Put, UploadError> {
    let step = UploadStep::PutBlob;
    let url = parse(blob, step)?;
    let host = url.authority().to_owned();
    let request = http
        .client(&url)
        .put(url)
        .header("x-ms-version", STORAGE_VERSION)
        .header("x-ms-client-request-id", request_id())
        .header("x-ms-blob-type", "BlockBlob")
        .header(IF_NONE_MATCH, "*")
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(CONTENT_LENGTH, size)
        .body(body);
    let answer = send(request, blob_put_timeout(size), STORAGE_ANSWER_SIZE_MAX)
        .await
        .map_err(|unanswered| unanswered.at(step, &host))?;
    match (answer.status, answer.error_code.as_deref()) {
        (201, _) => Ok(Put::Created),
        // The only condition that was sent is that there is no such blob.
        (409, Some("BlobAlreadyExists")) | (412, Some("ConditionNotMet")) => Ok(Put::Found),
        _ => Err(refused(&answer, step, &host)),
    }
}

/// Posts a message; 201 says that the queue has it, not that it is ingested.
pub async fn post_message(http: &Http, queue: &SasUrl, json: &str) -> Result<(), UploadError> {
    let step = UploadStep::PostMessage;
    let url = parse(&queue.join("messages"), step)?;
    let host = url.authority().to_owned();
    // Base64 has no character that XML would have to escape.
    let text = Zeroizing::new(STANDARD.encode(json));
    let xml = format!(
        "<?xml version=\"1.0\" encoding=\"utf-8\"?><QueueMessage><MessageText>{}</MessageText></QueueMessage>",
        &*text
    );
    let request = http
        .client(&url)
        .post(url)
        .header("x-ms-version", STORAGE_VERSION)
        .header("x-ms-client-request-id", request_id())
        .header(CONTENT_TYPE, "application/xml")
        .body(xml);
    let answer = send(request, QUEUE_POST_TIMEOUT, STORAGE_ANSWER_SIZE_MAX)
        .await
        .map_err(|unanswered| unanswered.at(step, &host))?;
    match answer.status {
        201 => Ok(()),
        _ => Err(refused(&answer, step, &host)),
    }
}

fn parse(url: &SasUrl, step: UploadStep) -> Result<Url, UploadError> {
    Url::parse(&url.expose()).map_err(|_| UploadError {
        remedy: Remedy::Refresh,
        step,
        code: "resource_unreadable".into(),
        detail: format!("{} is not a URL", url.place()),
    })
}

/// What an answer other than success means.
fn refused(answer: &Answer, step: UploadStep, host: &str) -> UploadError {
    let retry = Remedy::Retry {
        after: answer.retry_after,
    };
    let code = answer.error_code.as_deref();
    let remedy = match (answer.status, code) {
        // The signature has ended or was revoked, or the container or queue is gone: there are newer ones.
        (401 | 403, _) | (404, _) | (400, Some("InvalidAuthenticationInfo")) => Remedy::Refresh,
        (409, Some("ContainerBeingDeleted" | "QueueBeingDeleted" | "ContainerDisabled")) => {
            Remedy::Refresh
        }
        (408 | 429, _) | (500.., _) => retry,
        // The service's own word that it will never take this; without one it is somebody in between.
        (400 | 411 | 413, Some(_)) => Remedy::DeadLetter,
        _ => retry,
    };
    let hint = match (answer.status, answer.clock_skew) {
        (403, Some(skew)) if skew.as_secs().abs() > 60 => format!(
            ", and this machine's clock is {} s off the service's",
            skew.as_secs()
        ),
        (403, _) if code == Some("AuthorizationFailure") => {
            ", it refuses this network; check the cluster's private endpoint".into()
        }
        (300..400, _) => ", a redirect, which weir does not follow".into(),
        _ => String::new(),
    };
    UploadError {
        remedy,
        step,
        code: match code {
            Some(code) => code.to_owned(),
            None => format!("http_{}", answer.status),
        },
        detail: format!(
            "{host} answers {}{hint}, request {}",
            answer.status,
            answer.activity_id.as_deref().unwrap_or("unnamed")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_services_own_codes_decide() {
        let after = Some(Duration::from_secs(7));
        let retry = Remedy::Retry { after };
        for (status, code, expected) in [
            (403, Some("AuthenticationFailed"), Remedy::Refresh),
            (403, None, Remedy::Refresh),
            (404, Some("ContainerNotFound"), Remedy::Refresh),
            (404, Some("QueueNotFound"), Remedy::Refresh),
            (409, Some("ContainerBeingDeleted"), Remedy::Refresh),
            (408, None, retry),
            (429, Some("TooManyRequests"), retry),
            (500, Some("OperationTimedOut"), retry),
            (502, None, retry),
            (503, Some("ServerBusy"), retry),
            (504, None, retry),
            (400, Some("InvalidHeaderValue"), Remedy::DeadLetter),
            (413, Some("RequestBodyTooLarge"), Remedy::DeadLetter),
            (409, Some("AccountBeingCreated"), retry),
            // No storage service said so.
            (400, None, retry),
            (413, None, retry),
            (302, None, retry),
            (200, None, retry),
        ] {
            let answer = Answer {
                status,
                error_code: code.map(Into::into),
                retry_after: after,
                clock_skew: None,
                activity_id: None,
                body: Vec::new(),
            };
            let error = refused(&answer, UploadStep::PutBlob, "h");
            assert_eq!(error.remedy, expected, "{status} {code:?}");
            assert!(error.detail.contains(&status.to_string()), "{error}");
        }
    }
}
