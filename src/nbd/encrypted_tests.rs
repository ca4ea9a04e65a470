//! Stories about encrypted connections, with an independent TLS client on a thread of its own.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::thread::JoinHandle;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, StreamOwned};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, UnixStream};

use super::*;
use crate::nbd::stream::{ReadHalf, Stream, tune};
use crate::nbd::tls::{Encrypted, start};

const PATIENCE: Duration = Duration::from_secs(20);
const LONG: usize = 6 << 20;

/// A certificate authority, and what it has signed.
struct Authority {
    roots: Arc<RootCertStore>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(params.self_signed(&key).unwrap().der().clone()).unwrap();
        Self { roots: Arc::new(roots), issuer: Issuer::new(params, key) }
    }

    fn sign(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        (vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }

    fn server(&self) -> Arc<ServerConfig> {
        let verifier = WebPkiClientVerifier::builder(Arc::clone(&self.roots)).allow_unauthenticated().build().unwrap();
        let (certificates, key) = self.sign("localhost");
        let config = ServerConfig::builder().with_client_cert_verifier(verifier);
        Arc::new(config.with_single_cert(certificates, key).unwrap())
    }

    fn client(&self, name: Option<&str>) -> ClientConnection {
        let config = ClientConfig::builder().with_root_certificates(Arc::clone(&self.roots));
        let config = match name {
            Some(name) => {
                let (certificates, key) = self.sign(name);
                config.with_client_auth_cert(certificates, key).unwrap()
            }
            None => config.with_no_client_auth(),
        };
        ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap()
    }
}

type Client = StreamOwned<ClientConnection, StdUnixStream>;

/// Both ends of a Unix socket; the client's part is played on another thread.
async fn encrypted<T: Send + 'static>(
    name: Option<&str>,
    play: impl FnOnce(Client) -> T + Send + 'static,
) -> (Encrypted, JoinHandle<T>) {
    let authority = Authority::new();
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    theirs.set_write_timeout(Some(PATIENCE)).unwrap();
    let connection = authority.client(name);
    let client = std::thread::spawn(move || {
        let mut client = StreamOwned::new(connection, theirs);
        // The story begins when both ends have finished the handshake.
        client.read_exact(&mut [0; 5]).unwrap();
        play(client)
    });
    let stream = Stream::Unix(UnixStream::from_std(ours).unwrap());
    let mut encrypted = start(stream, &authority.server()).await.unwrap();
    encrypted.stream.write_all(b"hello").await.unwrap();
    (encrypted, client)
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| ((i * 31 + i / 1000 + seed) % 251) as u8).collect()
}

async fn within<T>(story: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, story).await.expect("took too long")
}

/// Writes all in the way that completing threads do: without a runtime, some parts at a time.
async fn write_in_parts(write: &WriteHalf, bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        let parts: Vec<_> = rest.chunks(30_000).take(128).map(IoSlice::new).collect();
        let sent = write.try_write_vectored(&parts).unwrap();
        rest = &rest[sent.taken_bytes..];
        if sent.socket_full {
            write.writable().await.unwrap();
        }
    }
    while write.try_flush().unwrap().socket_full {
        write.writable().await.unwrap();
    }
}

async fn read_to_end(mut read: ReadHalf) -> (Vec<u8>, io::Result<()>) {
    let mut found = Vec::new();
    let end = read.read_to_end(&mut found).await.map(drop);
    (found, end)
}

#[tokio::test]
async fn much_goes_both_ways_at_once() {
    let play = |mut client: Client| {
        // The client answers each chunk with one of its own, and so reads and writes in turns.
        let mut found = vec![0; LONG];
        let sent = pattern(LONG, 1);
        for (theirs, ours) in found.chunks_mut(100_000).zip(sent.chunks(100_000)) {
            client.write_all(ours).unwrap();
            client.read_exact(theirs).unwrap();
        }
        client.conn.send_close_notify();
        client.flush().unwrap();
        found
    };
    let (Encrypted { stream, names }, client) = encrypted(None, play).await;
    assert!(names.is_empty());
    let (read, write) = stream.split();
    let to_send = pattern(LONG, 2);
    let ((found, end), ()) = within(async { tokio::join!(read_to_end(read), write_in_parts(&write, &to_send)) }).await;
    end.unwrap();
    assert!(found == pattern(LONG, 1));
    assert!(client.join().unwrap() == pattern(LONG, 2));
}

#[tokio::test]
async fn a_reader_that_is_asleep_bounds_what_is_taken() {
    let (hold, held) = std::sync::mpsc::channel();
    let play = move |mut client: Client| {
        held.recv().unwrap();
        let mut found = vec![0; LONG];
        client.read_exact(&mut found).unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        (found, rest)
    };
    let (Encrypted { stream, .. }, client) = encrypted(None, play).await;
    let (_read, write) = stream.split();
    let to_send = pattern(LONG, 3);
    let mut taken = 0;
    loop {
        let sent = write.try_write_vectored(&[IoSlice::new(&to_send[taken..])]).unwrap();
        taken += sent.taken_bytes;
        if sent.socket_full {
            break;
        }
    }
    let sent = write.try_write_vectored(&[IoSlice::new(&to_send[taken..])]).unwrap();
    assert_eq!((sent.taken_bytes, sent.socket_full), (0, true), "taken while earlier bytes are unsent");
    assert!(taken < LONG / 2);
    hold.send(()).unwrap();
    within(write_in_parts(&write, &to_send[taken..])).await;
    within(write.shut_down_writing()).await.unwrap();
    let (found, rest) = client.join().unwrap();
    assert!(found == to_send && rest.is_empty());
}

#[tokio::test]
async fn a_client_that_has_said_its_last_still_gets_its_answers() {
    let play = |mut client: Client| {
        client.write_all(b"the last").unwrap();
        client.conn.send_close_notify();
        client.flush().unwrap();
        client.sock.shutdown(Shutdown::Write).unwrap();
        let mut found = Vec::new();
        // An error unless the server announces its end too.
        client.read_to_end(&mut found).unwrap();
        found
    };
    let (Encrypted { stream, .. }, client) = encrypted(None, play).await;
    let (read, write) = stream.split();
    let (found, end) = within(read_to_end(read)).await;
    end.unwrap();
    assert_eq!(found, b"the last");
    write_in_parts(&write, &pattern(LONG, 4)).await;
    within(write.shut_down_writing()).await.unwrap();
    assert!(client.join().unwrap() == pattern(LONG, 4));
}

#[tokio::test]
async fn a_connection_that_just_ends_was_lost() {
    let play = |mut client: Client| {
        client.write_all(b"half a requ").unwrap();
    };
    let (Encrypted { stream, .. }, client) = encrypted(None, play).await;
    let (read, _write) = stream.split();
    let (found, end) = within(read_to_end(read)).await;
    assert_eq!(found, b"half a requ");
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    client.join().unwrap();
}

#[tokio::test]
async fn what_was_good_is_read_before_forged_bytes_end_the_connection() {
    let play = |mut client: Client| {
        client.write_all(b"good").unwrap();
        let forged = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
        client.sock.write_all(&forged).unwrap();
        client.read_to_end(&mut Vec::new()).unwrap_err().to_string()
    };
    let (Encrypted { stream, .. }, client) = encrypted(None, play).await;
    let (read, write) = stream.split();
    let (found, end) = within(read_to_end(read)).await;
    assert_eq!(found, b"good");
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData);
    drop(write);
    let told = client.join().unwrap();
    assert!(told.contains("BadRecordMac"), "{told}");
}

#[tokio::test]
async fn keys_may_change_at_any_time() {
    let play = |mut client: Client| {
        for _ in 0..100 {
            client.write_all(b"ping").unwrap();
            client.conn.refresh_traffic_keys().unwrap();
            let mut answer = [0; 4];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(answer, *b"pong");
        }
    };
    let (Encrypted { mut stream, .. }, client) = encrypted(None, play).await;
    for _ in 0..100 {
        let mut request = [0; 4];
        within(stream.read_exact(&mut request)).await.unwrap();
        assert_eq!(request, *b"ping");
        within(stream.write_all(b"pong")).await.unwrap();
    }
    client.join().unwrap();
}

#[tokio::test]
async fn the_names_of_a_verified_certificate_are_known() {
    let play = |_client: Client| {};
    let (Encrypted { names, .. }, client) = encrypted(Some("vm-host-1"), play).await;
    assert_eq!(names, ["vm-host-1"]);
    client.join().unwrap();
}

#[tokio::test]
async fn garbage_instead_of_a_handshake_is_refused_also_over_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let client = std::thread::spawn(move || {
        let mut client = std::net::TcpStream::connect(address).unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        // An alert, unless the reset was faster.
        let _ = client.read_to_end(&mut answer);
    });
    let (stream, _) = listener.accept().await.unwrap();
    tune(&stream);
    let refused = within(start(Stream::Tcp(stream), &Authority::new().server())).await;
    assert_eq!(refused.err().unwrap().kind(), io::ErrorKind::InvalidData);
    client.join().unwrap();
}
