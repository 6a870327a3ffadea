//! Tokens: one at a time, renewed before they end, kept while a renewal fails.
//!
//! Before it: `identity.rs` can get one.
//! After it: a management command carries it. Deliveries need none: their URLs are signed.
//! Thread: the uplink's runtime. Allocates: per token.
//! Invariant: at most one request for a token is under way; a token that is still good is given out even where its
//! renewal failed; a token that was refused is never given out again.
//! Not here: who weir is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;

use crate::error::UploadError;
use crate::secret::Secret;

/// A bearer token.
pub struct Token {
    secret: Secret,
    issued_at: Instant,
    lifetime: Duration,
}

impl Token {
    pub fn new(secret: Secret, lifetime: Duration) -> Self {
        Token {
            secret,
            issued_at: Instant::now(),
            lifetime,
        }
    }

    pub fn expose(&self) -> &str {
        self.secret.expose()
    }

    pub fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Past four fifths of its life a token is renewed, which leaves the last fifth for trying.
    fn is_fresh(&self, now: Instant) -> bool {
        now.duration_since(self.issued_at) < self.lifetime / 5 * 4
    }

    fn is_valid(&self, now: Instant) -> bool {
        now.duration_since(self.issued_at) < self.lifetime
    }
}

/// Who gives tokens out.
#[async_trait::async_trait]
pub trait Issuer: Send + Sync {
    async fn issue(&self) -> Result<Token, UploadError>;
}

/// The token in use, of one audience.
pub struct TokenCache<I> {
    issuer: I,
    current: Mutex<Option<Arc<Token>>>,
}

impl<I: Issuer> TokenCache<I> {
    pub fn new(issuer: I) -> Self {
        TokenCache {
            issuer,
            current: Mutex::new(None),
        }
    }

    /// A valid token. Waits where there is none, or where one is being renewed.
    pub async fn token(&self) -> Result<Arc<Token>, UploadError> {
        // Held while the token is issued: who comes in the meantime takes what the first one gets.
        let mut current = self.current.lock().await;
        if let Some(token) = &*current
            && token.is_fresh(Instant::now())
        {
            return Ok(token.clone());
        }
        match (self.issuer.issue().await, &*current) {
            (Ok(token), _) => Ok(current.insert(Arc::new(token)).clone()),
            (Err(error), Some(token)) if token.is_valid(Instant::now()) => {
                tracing::warn!(%error, "the token is not renewed; the old one is used while it is valid");
                Ok(token.clone())
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Forgets a token that was refused, unless another has taken its place.
    pub async fn reject(&self, refused: &Arc<Token>) {
        let mut current = self.current.lock().await;
        if current
            .as_ref()
            .is_some_and(|token| Arc::ptr_eq(token, refused))
        {
            *current = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Remedy, UploadStep};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Gives out "1", "2", … of this lifetime; fails from call `fails_from` on.
    struct Fake {
        calls: AtomicU64,
        lifetime: Duration,
        fails_from: u64,
    }

    #[async_trait::async_trait]
    impl Issuer for Fake {
        async fn issue(&self) -> Result<Token, UploadError> {
            let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
            // So that others come while this is under way.
            tokio::task::yield_now().await;
            if call >= self.fails_from {
                return Err(UploadError {
                    remedy: Remedy::Retry { after: None },
                    step: UploadStep::Token,
                    code: "fake".into(),
                    detail: "down".into(),
                });
            }
            Ok(Token::new(Secret::new(call.to_string()), self.lifetime))
        }
    }

    fn cache(lifetime: Duration, fails_from: u64) -> TokenCache<Fake> {
        TokenCache::new(Fake {
            calls: AtomicU64::new(0),
            lifetime,
            fails_from,
        })
    }

    /// Moves the current token's issue into the past.
    async fn age(cache: &TokenCache<Fake>, age: Duration) {
        let mut current = cache.current.lock().await;
        let token = current.as_mut().unwrap();
        *token = Arc::new(Token {
            secret: token.secret.clone(),
            issued_at: Instant::now().checked_sub(age).unwrap(),
            lifetime: token.lifetime,
        });
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn many_that_ask_at_once_cause_one_request() {
        let cache = cache(MINUTE, u64::MAX);
        let (a, b, c) = tokio::join!(cache.token(), cache.token(), cache.token());
        for token in [a, b, c] {
            assert_eq!(token.unwrap().expose(), "1");
        }
        assert_eq!(cache.issuer.calls.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_token_is_renewed_after_four_fifths_of_its_life() {
        let cache = cache(MINUTE, u64::MAX);
        cache.token().await.unwrap();
        age(&cache, MINUTE / 100 * 79).await;
        assert_eq!(cache.token().await.unwrap().expose(), "1");
        age(&cache, MINUTE / 100 * 81).await;
        assert_eq!(cache.token().await.unwrap().expose(), "2");
    }

    #[tokio::test]
    async fn a_valid_token_outlives_a_failed_renewal_and_no_longer() {
        let cache = cache(MINUTE, 2);
        cache.token().await.unwrap();
        age(&cache, MINUTE / 100 * 90).await;
        assert_eq!(cache.token().await.unwrap().expose(), "1");
        age(&cache, MINUTE).await;
        assert!(cache.token().await.is_err());
    }

    #[tokio::test]
    async fn a_refused_token_is_not_given_out_again() {
        let cache = cache(MINUTE, u64::MAX);
        let first = cache.token().await.unwrap();
        cache.reject(&first).await;
        assert_eq!(cache.token().await.unwrap().expose(), "2");
        // A late refusal of the first does not touch the second.
        cache.reject(&first).await;
        assert_eq!(cache.token().await.unwrap().expose(), "2");
    }
}
