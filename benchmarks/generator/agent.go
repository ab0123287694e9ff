package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

const (
	small = 64
	blob  = 1 << 20
)

// seen counts requests, and those among them that named the caller that was expected.
var seen, proven atomic.Int64

// serve is the agent behind the proxies, plain HTTP/1.1 and h2c on one port. The path says what is answered: 64 bytes, 1 MiB, a
// stream of events, one gRPC message. `GET /-/count` tells what it has seen and counts for nothing.
func serve(address, caller, pace string) error {
	var count, every int
	if _, err := fmt.Sscanf(pace, "%d/%d", &count, &every); err != nil {
		return fmt.Errorf("EVENTS/MILLISECONDS: %w", err)
	}
	text, large := bytes.Repeat([]byte("x"), small), bytes.Repeat([]byte("x"), blob)
	message := append([]byte{0, 0, 0, 0, small}, text...)
	handler := func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/-/count" {
			_ = json.NewEncoder(w).Encode(map[string]int64{"seen": seen.Load(), "proven": proven.Load()})
			return
		}
		seen.Add(1)
		if named := r.Header["X-Forwarded-Spiffe-Id"]; len(named) == 1 && named[0] == caller {
			proven.Add(1)
		}
		switch {
		case strings.HasPrefix(r.URL.Path, "/budget/blob"):
			w.Header()["Content-Type"] = []string{"application/octet-stream"}
			w.Header()["Content-Length"] = []string{fmt.Sprint(blob)}
			_, _ = w.Write(large)
		case strings.HasPrefix(r.URL.Path, "/budget/events"):
			events(w, count, time.Duration(every)*time.Millisecond)
		case strings.HasPrefix(r.URL.Path, "/bench.Echo/"):
			_, _ = io.Copy(io.Discard, r.Body)
			w.Header()["Content-Type"] = []string{"application/grpc"}
			w.Header()["Trailer"] = []string{"Grpc-Status"}
			_, _ = w.Write(message)
			w.Header()["Grpc-Status"] = []string{"0"}
		default:
			if r.ContentLength != 0 {
				_, _ = io.Copy(io.Discard, r.Body)
			}
			w.Header()["Content-Type"] = []string{"text/plain"}
			_, _ = w.Write(text)
		}
	}
	server := &http.Server{Addr: address, Handler: http.HandlerFunc(handler), Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	return server.ListenAndServe()
}

func events(w http.ResponseWriter, count int, every time.Duration) {
	w.Header()["Content-Type"] = []string{"text/event-stream"}
	flusher := w.(http.Flusher)
	ticks := time.NewTicker(every)
	defer ticks.Stop()
	for range count {
		// The number is when this was sent; the rest makes it as long as a short event of a model.
		if _, err := fmt.Fprintf(w, "data: %020d %s\n\n", time.Now().UnixNano(), strings.Repeat("x", 35)); err != nil {
			return
		}
		flusher.Flush()
		<-ticks.C
	}
}
